"""The templates of the program's pages."""

from __future__ import annotations

from typing import Any

import jinja2

from sapwood.text import one_line, visible

NOTHING = "\N{EN DASH}"
PLAIN = "report.md.jinja"
"""The one that is no HTML."""
MARKED = str.maketrans({"|": r"\|", "<": "&lt;", "[": r"\[", "`": r"\`"})
"""What begins a cell, a tag, a link or code in Markdown, made text."""


def templates() -> jinja2.Environment:
    """The pages of the program, with the filters that they use."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("sapwood", "experiments"),
        autoescape=lambda name: name != PLAIN,
        undefined=jinja2.StrictUndefined,
        finalize=_harmless,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": lambda share: f"{100 * share:g} %",
        "plain": lambda text: one_line(text).translate(MARKED),
        "seconds": lambda seconds: NOTHING if seconds is None else f"{seconds:.2f}",
        "mib": lambda size: NOTHING if size is None else f"{size / 2**20:,.0f}",
    }
    return environment


def _harmless(value: Any) -> Any:
    """Text from outside without control characters, which are legal on no page; what is markup already stays."""
    return visible(value) if isinstance(value, str) and not hasattr(value, "__html__") else value
