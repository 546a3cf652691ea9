"""Arms: how gamma moves in a run, as the config spells it, and as a homotopy."""

import dataclasses
import functools
import math
from typing import Any

from vaebal import homotopy
from vaebal.errors import InputError
from vaebal.experiments import checks
from vaebal.experiments.report import Row
from vaebal.homotopy import Homotopy
from vaebal.homotopy.rules import RELEASED_RATE
from vaebal.training import Member


@dataclasses.dataclass(frozen=True)
class Arm:
    """How gamma moves.

    Attributes:
      name: as in the config: "adaptive", "guarded", "learned RATE", "adam RATE", "held GAMMA",
        "annealed RATE to ARM", "fixed at ARM", "settled after ARM".
      kind: its first word.
      number: nats of log gamma a step, at most, or gamma where it is held; 0 where it is fixed.
      of: the arm whose final gamma this one ends at, or that it goes on from; "" for others.
    """

    name: str
    kind: str
    number: float
    of: str = ""


def parse(text: str, fastest: float) -> Arm:
    """The arm that `text` spells; the adaptive homotopy moves at most `fastest` nats a step.

    Raises:
      InputError: it spells none.
    """
    match text.split():
        case ["adaptive" | "guarded"]:
            return Arm(text, text, fastest)
        case ["learned" | "adam" | "held" as kind, number] if _is_positive(number):
            return Arm(text, kind, float(number))
        case ["annealed", rate, "to", *of] if of and _is_positive(rate):
            return Arm(text, "annealed", float(rate), " ".join(of))
        case ["fixed", "at", *of] if of:
            return Arm(text, "fixed", 0.0, " ".join(of))
        case ["settled", "after", *of] if of:
            return Arm(text, "settled", RELEASED_RATE, " ".join(of))
    raise InputError(
        f"train.arms holds {text!r}: an arm is 'adaptive', 'guarded', 'learned RATE', 'adam "
        "RATE', 'held GAMMA', 'annealed RATE to ARM', 'fixed at ARM' or 'settled after ARM', with "
        "a RATE in nats of log γ a step."
    )


def _is_positive(text: str) -> bool:
    try:
        return 0 < float(text) < float("inf")
    except ValueError:
        return False


def arms(config: Any) -> list[Arm]:
    """The config's arms, each after the arm whose final gamma it needs.

    Raises:
      InputError: an arm that none spells, or that needs the final gamma of one that is not run.
    """
    found: list[Arm] = []
    for text in checks.distinct(config, "train.arms"):
        arm = parse(text, config.train.fastest)
        if arm.of.startswith(("fixed", "held", "settled")):
            raise InputError(
                f"train.arms holds {text!r}: {arm.of!r} did not find its γ itself; name the arm "
                "that it comes from."
            )
        if arm.of and arm.of not in [other.name for other in found]:
            raise InputError(
                f"train.arms holds {text!r}, but {arm.of!r} is not run before it, so its final γ "
                "is not known: put it earlier in the list."
            )
        found.append(arm)
    return found


def _learned(member: Member) -> Homotopy:
    return homotopy.closed_form(member.rule["rate"])


def _annealed(member: Member) -> Homotopy:
    return homotopy.prescribed(member.rule["rate"], member.rule["end"])


def _adam(member: Member, dim: int) -> Homotopy:
    return homotopy.gradient(member.rule["rate"], dim)


def _guarded(
    member: Member,
    dim: int,
    memory: int,
    slowest: float,
    release: tuple[float, float] | None,
    patience: float,
) -> Homotopy:
    rule = homotopy.guarded(
        member.rule["rate"],
        dim=dim,
        guard=member.rule["guard"],
        memory=memory,
        slowest=slowest,
        release=release,
    )
    if not patience:
        return rule
    return homotopy.one_by_one(rule, patience=patience, memory=memory)


def rule(kind: str, config: Any, dim: int, steps: int) -> Any:
    """The program's rule for arms of a kind: a member's numbers -> its homotopy.

    Args:
      dim: D.
      steps: of the whole training.
    """
    train = config.train
    match kind:
        case "learned" | "settled":
            return _learned
        case "annealed":
            return _annealed
        case "adam":
            return functools.partial(_adam, dim=dim)
        case "adaptive" | "guarded":
            start, end = train.release
            return functools.partial(
                _guarded, dim=dim, memory=train.guard_memory, slowest=train.slowest,
                release=(start * steps, end * steps) if kind == "adaptive" else None,
                patience=train.patience,
            )  # fmt: skip
    return lambda member: homotopy.fixed()  # "fixed", "held": where gamma starts


def member(config: Any, arm: Arm, seed: int, gamma_start: float, of: Row) -> Member:
    """A run's part of its program's inputs.

    Args:
      gamma_start: where gamma starts, if the arm says nothing else.
      of: the row of the run of the arm `arm.of`, if there is one. Of a run that stopped it has no
        gamma: then this one starts at NaN, and stops at once.
    """
    start, numbers, latents = gamma_start, {"rate": arm.number}, config.model.latents
    gamma_of = of.get("gamma", math.nan)
    match arm.kind:
        case "fixed":
            start, numbers = gamma_of, {}
        case "settled":
            start, latents = gamma_of, of.get("open", latents)
        case "held":
            start, numbers = arm.number, {}
        case "annealed":
            numbers |= {"end": gamma_of}
            start = gamma_of if math.isnan(gamma_of) else start
        case "adaptive" | "guarded":
            numbers |= {"guard": config.train.guard}
    return Member(seed, latents, start, rule=numbers)
