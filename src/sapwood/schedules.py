"""How dense the network is after each round: decreasing lists that end exactly on the target.

All densities are shares of the prunable weights, 0 to 1; round t runs from 1 to T, round 0 would be dense.
"""

from __future__ import annotations

from collections.abc import Callable

from sapwood.errors import ConfigError, unknown_name


def exponential(density: float, rounds: int) -> list[float]:
    """Density d^(t/T): every round keeps the same share of what is left (Tanaka et al. 2020; NTK-SAP, Algorithm 1)."""
    return [density ** (t / rounds) for t in range(1, rounds + 1)]


def linear(density: float, rounds: int) -> list[float]:
    """Density 1 - (1-d) t/T: every round removes the same number of weights."""
    return [1 - (1 - density) * t / rounds for t in range(1, rounds + 1)]


def cubic(density: float, rounds: int) -> list[float]:
    """Density d + (1-d)(1-t/T)^3: fast first, slow at the end (Zhu & Gupta 2017)."""
    return [density + (1 - density) * (1 - t / rounds) ** 3 for t in range(1, rounds + 1)]


MOST = 1_000_000  # rounds
SCHEDULES: dict[str, Callable[[float, int], list[float]]] = {
    "exponential": exponential,
    "linear": linear,
    "cubic": cubic,
}


def check(schedule: str, rounds: int) -> None:
    """Refuses a schedule that there is none of.

    Raises:
        ConfigError: an unknown name, fewer than one round, or more than `MOST`.
    """
    if schedule not in SCHEDULES:
        raise unknown_name("schedule", schedule, SCHEDULES)
    if not 1 <= rounds <= MOST:
        raise ConfigError(f"rounds is {rounds}; it must be 1 or more, and at most {MOST:,}.")


def densities(schedule: str, density: float, rounds: int) -> list[float]:
    """The densities after each of `rounds` rounds; the last is `density` to the bit.

    Raises:
        ConfigError: an unknown schedule, or fewer than one round.
    """
    check(schedule, rounds)
    return [*SCHEDULES[schedule](density, rounds)[:-1], density]
