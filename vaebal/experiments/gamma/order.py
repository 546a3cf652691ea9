"""Rows of runs, as the page orders, pairs and names them.

An arm says how gamma moves, r is the data's true dimension (0: unknown). Pairs are runs of the
same r and seed, so of the same data, initialisation and noise.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

from vaebal.experiments.report import Row, column, rows_with

Key = tuple[str, int, int]  # arm, r, seed

MOVING = ("learned", "adam", "annealed")  # at a speed that the arm says
STILL = ("fixed", "held")
COUNTED = ("settled", "plain")  # at a count that another arm found, or that is given
ASIDE = (*COUNTED, *STILL)  # with no speed of descent
KINDS = ("adaptive", "guarded", *MOVING, *ASIDE)
ACTIVE = "active_0.01"


def kind(arm: str) -> str:
    """Its first word, one of KINDS."""
    return arm.split()[0]


def source(arm: str) -> str:
    """The arm whose gamma* `arm` is fixed at, that it goes on from or counts by; else itself."""
    return arm.rpartition(" after ")[2].removeprefix("fixed at ")


def rate(arm: str) -> float:
    """Its prescribed speed in nats of log gamma a step; NaN where there is none."""
    return float(arm.split()[1]) if kind(arm) in MOVING else math.nan


def speed(row: Row) -> float:
    """Nats of log gamma a step: prescribed, or a guarded run's mean; NaN of those ASIDE."""
    if kind(row["arm"]) in ("adaptive", "guarded"):
        return math.log(row["gamma_start"] / row["gamma"]) / row["steps"]
    return rate(row["arm"])


def in_order(arms: Iterable[str]) -> list[str]:
    """Distinct arms by kind, then number; the still ones last, fixed ones as their sources."""

    def place(arm: str) -> tuple:
        moving = source(arm)
        numbers = [float(word) for word in moving.split() if word[0].isdecimal() or word[0] == "."]
        return kind(arm) in STILL, KINDS.index(kind(moving)), numbers[::-1], arm

    return sorted(set(arms), key=place)


def arms_of(rows: Sequence[Row], *kinds: str) -> list[str]:
    """The rows' arms, of these kinds if any are given, in order."""
    arms = in_order(column(rows, "arm"))
    return [arm for arm in arms if kind(arm) in kinds or not kinds]


def shown(arm: str) -> str:
    """`arm` as readers see it."""
    if kind(arm) == "held":
        return arm.replace("held", "γ held at")
    arm = arm.replace("adaptive ", "adaptive, patience ")
    if kind(arm) == "plain":
        arm = arm.replace("plain", "learned").replace(" of ", ", κ = ")
        return arm.replace(" after ", ", as many latents as ")
    return arm.replace("fixed at ", "fixed at γ* of ").replace(" to ", " to γ* of ")


def ranks_of(rows: Sequence[Row]) -> list[int]:
    """Every r, ascending."""
    return sorted(set(column(rows, "rank")))


def of_known_rank(rows: Sequence[Row]) -> list[Row]:
    """The rows whose r is known."""
    return [row for row in rows if row["rank"]]


def pairs_of(rows: Sequence[Row], fixed: str) -> list[tuple[Row, Row]]:
    """(learned, fixed) runs of the same r and seed, for the arm `fixed`."""
    learned = {(row["rank"], row["seed"]): row for row in rows_with(rows, arm=source(fixed))}
    return [
        (learned[row["rank"], row["seed"]], row)
        for row in rows_with(rows, arm=fixed)
        if (row["rank"], row["seed"]) in learned
    ]


def reference(rows: Sequence[Row]) -> dict[tuple[int, int], Row]:
    """By (r, seed): the "learned" run of least error; where r is known, of those with more active.

    Of unknown r none can be said to be crowded.
    """
    found: dict[tuple[int, int], Row] = {}
    for row in rows:
        place = row["rank"], row["seed"]
        if kind(row["arm"]) == "learned" and (not row["rank"] or row[ACTIVE] > row["rank"]):
            found[place] = min(found.get(place, row), row, key=lambda run: run["error_mean"])
    return found


def price(runs: Sequence[Row], beside: Mapping[tuple[int, int], Row]) -> list[tuple[float, float]]:
    """(error over that of the run of `beside`, −ELBO less its, in nats), where there is one."""
    pairs = [(row, beside.get((row["rank"], row["seed"]))) for row in runs]
    return [compared(other, row) for row, other in pairs if other]


def compared(before: Row, after: Row) -> tuple[float, float]:
    """Error `after` over that `before`, and the difference of −ELBO in nats."""
    errors = after["error_mean"] / before["error_mean"]
    return errors, after["negative_elbo"] - before["negative_elbo"]


def count(rows: Sequence[Row]) -> str:
    """In how many of the runs active = r, "4 of 6"; empty where r is unknown."""
    known = of_known_rank(rows)
    exact = sum(row[ACTIVE] == row["rank"] for row in known)
    return f"{exact} of {len(known)}" if known else ""
