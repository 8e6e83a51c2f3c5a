"""The program `sapwood`. Every command is a dataclass whose fields are its flags, in a file of its own."""

from __future__ import annotations

import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Annotated

import torch
import tyro
from tyro.conf import OmitArgPrefixes, subcommand

from sapwood.checks import check
from sapwood.cli.compare import Compare
from sapwood.cli.ntk import Ntk
from sapwood.cli.prune import Prune
from sapwood.cli.recipes import Recipes
from sapwood.cli.run import Run
from sapwood.cli.show import Show
from sapwood.cli.sweep import Sweep
from sapwood.cli.train import Train
from sapwood.errors import SapwoodError, SapwoodWarning, for_the_user
from sapwood.experiments import terminal

USAGE, INTERRUPTED = 2, 130  # exit codes; 130 = 128 + SIGINT, as in a shell

Command = (
    Annotated[Prune, subcommand("prune")]
    | Annotated[Train, subcommand("train")]
    | Annotated[Compare, subcommand("compare")]
    | Annotated[Sweep, subcommand("sweep")]
    | Annotated[Recipes, subcommand("recipes")]
    | Annotated[Run, subcommand("run")]
    | Annotated[Show, subcommand("show")]
    | Annotated[Ntk, subcommand("ntk")]
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program.

    Args:
        argv: The arguments; None takes those of the process.

    Returns:
        0; 1 if a run of a comparison failed; 2 for what the user can put right; 130 after Ctrl-C.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    with warnings.catch_warnings(), terminal.legible():
        warnings.simplefilter("always", SapwoodWarning)
        warnings.showwarning = for_the_user(lambda message, *_, **__: terminal.complain("warning", message))
        code = 0
        try:
            with terminal.reader_may_leave():
                code = parsed(argv)(shlex.join(["sapwood", *argv]))
                if sys.stdout is not None:
                    sys.stdout.flush()
            return code
        except (SapwoodError, OSError) as error:
            terminal.complain("error", error)
            terminal.drop_unwritable()
            return USAGE
        except (MemoryError, RuntimeError) as error:
            if not _is_of_memory(error):
                raise
            terminal.complain("error", f"the memory is not enough ({error}): choose smaller sizes or batches.")
            return USAGE
        except KeyboardInterrupt:
            terminal.complain("error", "interrupted; the same command goes on from here.")
            return INTERRUPTED


def parsed(argv: Sequence[str]) -> Callable[[str], int]:
    """The command that arguments say, every name, number and path in it checked; nothing is run or written yet.

    Raises:
        ConfigError: a value is illegal.
        SystemExit: help was asked for, or there is no such command or flag: tyro has said so.
    """
    command: Callable[[str], int] = tyro.cli(Command, prog="sapwood", args=argv, config=(OmitArgPrefixes,))
    check(command, flags=True)
    return command


def _is_of_memory(error: BaseException) -> bool:
    """Whether memory was lacking; torch has an exception of its own for GPUs only."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
