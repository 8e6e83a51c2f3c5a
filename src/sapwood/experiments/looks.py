"""How methods look in figures: Okabe and Ito's colours with a marker each, so that none is told by colour alone."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#111111", "#a89b00")  # the yellow, darker
MARKERS = ("o", "s", "^", "D", "v", "<", ">")
INK, MUTED, GRID = "#1d2129", "#5b6470", "#dfe3e8"
SECOND_ROUND, CONTROL = (0, (6, 1.5, 1, 1.5)), (0, (3, 1.5))  # dash-dotted, dashed
RANDOM = {"random": "X", "erk": "P"}  # they control for every method, a shuffle for its own
CONTROLS = {  # filled part of the marker, dashes
    "shuffle": ("none", CONTROL),
    "shuffle-taps": ("bottom", (0, (1.2, 1))),
    "reinit": ("left", (0, (7, 2))),
    "invert": ("top", (0, (3, 1.2, 1, 1.2, 1, 1.2))),
}

Look = dict[str, Any]


def looks(labels: Sequence[str]) -> dict[str, Look]:
    """Colour, marker and line of every method, the same in all figures of a report.

    Controls are dashed: random masks in grey, those of a method in its colour with hollow or half-filled markers, each
    control with dashes of its own.
    """
    order = [label for label in dict.fromkeys(map(subject_of, labels)) if label not in RANDOM]
    return {
        label: _hollow(look, control) if (control := control_of(label)) else look
        for label, look in _full(labels, order)
    }


def subject_of(label: str) -> str:
    """The label without the control: `snip@rounds=2` of `snip@rounds=2,control=shuffle`."""
    return re.sub(r"[@,]control=[\w-]+$", "", label)


def control_of(label: str) -> str:
    """The control in a label, or nothing: `shuffle` of `snip@rounds=2,control=shuffle`."""
    return label[len(subject_of(label)) :].rpartition("=")[2]


def _full(labels: Sequence[str], order: Sequence[str]) -> Iterator[tuple[str, Look]]:
    for label in labels:
        subject = subject_of(label)
        if subject in RANDOM:
            look: Look = {"color": MUTED, "marker": RANDOM[subject], "linestyle": CONTROL}
        else:
            i = order.index(subject)
            look = {"color": SERIES[i % len(SERIES)], "marker": MARKERS[i % len(MARKERS)]}
            look["linestyle"] = "-" if i < len(SERIES) else SECOND_ROUND
        yield label, {**look, "markeredgewidth": 0}


def _hollow(look: Look, control: str) -> Look:
    filled, dashes = CONTROLS.get(control, ("none", CONTROL))
    marker = {"markerfacecolor": "none"} if filled == "none" else {"fillstyle": filled}
    return {**look, "linestyle": dashes, "markeredgewidth": 1.2, **marker}
