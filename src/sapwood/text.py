"""Text for terminals and pages: tables, and names from outside made harmless."""

from __future__ import annotations

from collections.abc import Sequence


def visible(text: object) -> str:
    r"""What somebody else wrote, with everything escaped that does not print.

    A control character moves the cursor or recolours the terminal, a direction mark reorders the line, and neither is
    legal in an SVG. Spaces stay; line breaks do not.

    >>> visible("fc\x1b[31m.weight")
    'fc\\x1b[31m.weight'
    """
    return "".join(map(_shown, str(text)))


def one_line(text: object) -> str:
    r"""Somebody else's sentence, its line breaks and runs of space made one space, the rest as `visible`.

    >>> one_line("first\n   second")
    'first second'
    """
    return visible(" ".join(str(text).split()))


def text_table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Aligns columns: the first two to the left, numbers to the right."""
    table = [header, *(tuple(map(visible, row)) for row in rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]

    lines = []
    for row in table:
        left = [cell.ljust(width) for cell, width in zip(row[:2], widths[:2], strict=True)]
        right = [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
        lines.append("  ".join([*left, *right]).rstrip())
    return "\n".join(lines)


def _shown(character: str) -> str:
    if character.isprintable():
        return character
    return character.encode("unicode_escape").decode("ascii")
