"""`sapwood show`: what is in a mask file."""

from __future__ import annotations

from dataclasses import dataclass

from tyro.conf import Positional

from sapwood.cli.flags import File
from sapwood.experiments import terminal
from sapwood.masks import Masks


@dataclass(frozen=True)
class Show:
    """Show what is in a mask file: how it came about, and how many weights of each layer it keeps.

    Attributes:
        file: Mask file.
        csv: Print the layers as CSV, and nothing else.
    """

    file: Positional[File]
    csv: bool = False

    def __call__(self, typed: str) -> int:
        """Does it; returns the exit code."""
        masks = Masks.load(self.file)
        if self.csv:
            terminal.print_csv(masks)
        else:
            terminal.show(terminal.provenance_table(masks))
            terminal.show(terminal.mask_table(masks))
        return 0
