"""The templates of the program's pages."""

from __future__ import annotations

import jinja2

NOTHING = "\N{EN DASH}"
PLAIN = "report.md.jinja"
"""The one that is no HTML."""


def templates() -> jinja2.Environment:
    """The pages of the program, with the filters that they use."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("sapwood", "experiments"),
        autoescape=lambda name: name != PLAIN,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": lambda share: f"{100 * share:g} %",
        "plain": lambda text: str(text).translate({ord("|"): "\\|", ord("<"): "&lt;", ord("\n"): " "}),
        "seconds": lambda seconds: NOTHING if seconds is None else f"{seconds:.2f}",
        "mib": lambda size: NOTHING if size is None else f"{size / 2**20:,.0f}",
    }
    return environment
