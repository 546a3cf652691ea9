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
      name: as in the config: "adaptive", "adaptive PATIENCE", "guarded", "learned RATE", "adam
        RATE", "held GAMMA", "annealed RATE to ARM", "fixed at ARM", "settled after ARM", "plain
        RATE after ARM", "plain RATE of K".
      kind: its first word.
      number: nats of log gamma a step, at most, or gamma where it is held; 0 where it is fixed.
      of: the arm whose final gamma this one ends at, that it goes on from, or whose number of
        latents it has; "" for others.
      patience: steps before the next latent opens, if it says so; 0: the config's.
      latents: kappa, if it says so; 0: the config's.
    """

    name: str
    kind: str
    number: float
    of: str = ""
    patience: float = 0.0
    latents: int = 0

    @property
    def lengths(self) -> int:
        """How many times `train.epochs` it takes: "plain" the steps of ARM and what settles it."""
        return 2 if self.kind == "plain" else 1


def parse(text: str, fastest: float) -> Arm:
    """The arm that `text` spells; the adaptive homotopy moves at most `fastest` nats a step.

    Raises:
      InputError: it spells none.
    """
    match text.split():
        case ["adaptive" | "guarded"]:
            return Arm(text, text, fastest)
        case ["adaptive", steps] if checks.is_positive(steps) and float(steps) >= 1:
            return Arm(text, "adaptive", fastest, patience=float(steps))
        case ["learned" | "adam" | "held" as kind, number] if checks.is_positive(number):
            return Arm(text, kind, float(number))
        case ["annealed", rate, "to", *of] if of and checks.is_positive(rate):
            return Arm(text, "annealed", float(rate), " ".join(of))
        case ["fixed", "at", *of] if of:
            return Arm(text, "fixed", 0.0, " ".join(of))
        case ["settled", "after", *of] if of:
            return Arm(text, "settled", RELEASED_RATE, " ".join(of))
        case ["plain", rate, "after", *of] if of and checks.is_positive(rate):
            return Arm(text, "plain", float(rate), " ".join(of))
        case ["plain", rate, "of", latents] if latents.isdecimal() and checks.is_positive(rate):
            return Arm(text, "plain", float(rate), latents=int(latents))
    raise InputError(
        f"train.arms holds {text!r}: an arm is 'adaptive', 'adaptive PATIENCE', 'guarded', "
        "'learned RATE', 'adam RATE', 'held GAMMA', 'annealed RATE to ARM', 'fixed at ARM', "
        "'settled after ARM', 'plain RATE after ARM' or 'plain RATE of K', with a RATE in nats of "
        "log γ a step and a PATIENCE of at least one step."
    )


def arms(config: Any) -> list[Arm]:
    """The config's arms, each after the arm whose final gamma it needs.

    Raises:
      InputError: an arm that none spells, or that needs the final gamma of one that is not run.
    """
    found: list[Arm] = []
    for text in checks.distinct(config, "train.arms"):
        arm = parse(text, config.train.fastest)
        if arm.of.startswith(("fixed", "held", "settled", "plain")):
            raise InputError(
                f"train.arms holds {text!r}: {arm.of!r} did not find its γ itself; name the arm "
                "that it comes from."
            )
        if arm.of and arm.of not in [other.name for other in found]:
            raise InputError(
                f"train.arms holds {text!r}, but {arm.of!r} is not run before it, so its final γ "
                "is not known: put it earlier in the list."
            )
        if arm.patience and not config.train.patience:
            raise InputError(
                f"train.arms holds {text!r}, and train.patience=0 has all latents open from the "
                "start: set train.patience above 0 (an arm that says its own has that one)."
            )
        if arm.latents > config.model.latents or text.endswith(" of 0"):
            raise InputError(
                f"train.arms holds {text!r}: K must be 1 to model.latents={config.model.latents}."
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
    opens: bool,
) -> Homotopy:
    rule = homotopy.guarded(
        member.rule["rate"],
        dim=dim,
        guard=member.rule["guard"],
        memory=memory,
        slowest=slowest,
        release=release,
    )
    if not opens:
        return rule
    return homotopy.one_by_one(rule, patience=member.rule["patience"], memory=memory)


def rule(kind: str, config: Any, dim: int, steps: int) -> Any:
    """The program's rule for arms of a kind: a member's numbers -> its homotopy.

    Args:
      dim: D.
      steps: of the whole training.
    """
    train = config.train
    match kind:
        case "learned" | "settled" | "plain":
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
                opens=train.patience > 0,
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
        case "plain":
            latents = arm.latents or of.get("open", latents)
            start = gamma_of if arm.of and math.isnan(gamma_of) else start
        case "held":
            start, numbers = arm.number, {}
        case "annealed":
            numbers |= {"end": gamma_of}
            start = gamma_of if math.isnan(gamma_of) else start
        case "adaptive" | "guarded":
            patience = float(arm.patience or config.train.patience)
            numbers |= {"guard": config.train.guard, "patience": patience}
    return Member(seed, latents, start, rule=numbers)
