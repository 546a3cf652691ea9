"""From evidence to a verdict. Every threshold is here; they were chosen on tuning seeds alone.

The order of questions. Does the residual hold structure that a latent could explain, or does z
lose what the mean keeps? Then x is badly reconstructed, whatever the counts. If not: are active
latents functions of the others, is the aggregate posterior far from the prior, is gamma below its
stationary value? Then fewer latents would do. Balance is what passes both, with every criterion in
agreement; what fails only one of these is undecided, and says which.

The ratio of the residual's largest variance to gamma decides nothing by itself: where the decoder
is not perfect it stays between 2 and 400 in balance too. What it is worth in the data's variance
does.
"""

from typing import NamedTuple

import numpy as np

from vaebal.diagnosis.evidence import Evidence
from vaebal.measures.evaluation import Estimate

BALANCED, OVER, UNDER, UNDECIDED = (
    "balanced", "over-regularized", "under-regularized", "undecided",
)  # fmt: skip

STRUCTURED, STRUCTURED_DOUBT = 0.015, 0.01  # share of the data's variance left in directions
STRUCTURED_BOTH = 0.1  # below this a crowded model's error does not decide
DROWNED_SHARE, DROWNED_RATIO = 0.05, 1.5  # lost at a sampled z, with gamma above its value
LOST_DOUBT = 0.025  # share of the data's variance lost at a sampled z, beyond white noise
# Of a latent's variance, told by the others: at most .35 in balance, .6 and more in crowds.
REPEATED, REPEATED_DOUBT = 0.5, 0.4
# Redundancy, and how many latents that makes too many: of a circle 2, of a sphere 3/2, one latent.
CROWDED, CROWDED_LATENTS = 1.35, 1.5
FAR = 0.3  # MMD^2 of the aggregate posterior; a point mass at 0 is about 2 away
GAMMA_SMALL, GAMMA_RANGE = 1 / 3, (0.5, 2.0)  # gamma over its stationary value
MISSING = 1.3  # dimension of x over that of the codes


class Verdict(NamedTuple):
    """A verdict with its grounds.

    Attributes:
      name: "balanced", "over-regularized", "under-regularized" or "undecided".
      reasons: sentences that speak for it.
      missing: of "undecided": what stands against balance, or was not given.
      advice: what to do next, one sentence.
    """

    name: str
    reasons: tuple[str, ...]
    missing: tuple[str, ...]
    advice: str


def _above(estimate: Estimate | None, threshold: float) -> bool:
    """Whether by more than two standard errors."""
    return estimate is not None and estimate.value - 2 * estimate.error > threshold


def redundancy(evidence: Evidence) -> Estimate | None:
    """Active latents over the dimension of their codes.

    Where latents inform some examples and not others (unions of manifolds) it is at most the
    informative latents of one example over that dimension.
    """
    found = evidence.redundancy
    if found is None or not evidence.intermittent:
        return found
    dimension, number = evidence.codes.value.value, evidence.informative_per_example
    per_example = Estimate(number.value / dimension, number.error / dimension)
    return min(found, per_example, key=lambda estimate: estimate.value)


def repeating(evidence: Evidence) -> np.ndarray:
    """The latents that are told by the others, by more than two standard errors; indices."""
    surely = evidence.repeated - 2 * evidence.repeated_error
    return np.flatnonzero(np.nan_to_num(surely) > REPEATED)


def _too_many(evidence: Evidence) -> float:
    """How many active latents there are beyond the dimension of their codes; 0 where in doubt."""
    excess = redundancy(evidence)
    if not _above(excess, CROWDED):
        return 0.0
    return evidence.active.value * (1 - 1 / excess.value)


def _drowned(evidence: Evidence) -> bool:
    """Whether a sampled z loses what the mean keeps because gamma is too large."""
    ratio = evidence.gamma_ratio
    if ratio is None or ratio <= DROWNED_RATIO:
        return False
    return _above(evidence.unexplained_sampled, DROWNED_SHARE)


def _badly_reconstructed(evidence: Evidence) -> list[str]:
    """Signs of over-regularization."""
    found, ratio, sampled = [], evidence.gamma_ratio, evidence.unexplained_sampled
    if not evidence.active.value and not evidence.informative.value:
        found.append("No latent carries information about x: total collapse.")
    if evidence.structured > STRUCTURED:
        found.append(
            f"{evidence.structured:.1%} of the data's variance is left in directions of the "
            "residual that stand out of noise."
        )
    if _drowned(evidence):
        found.append(
            f"A sampled z loses {sampled.value:.1%} of the data's variance, with γ at {ratio:.3g} "
            "times its stationary value: latents are drowned in noise."
        )
    return found


def _crowd(evidence: Evidence) -> str:
    """The sentence that more latents are active than the codes need; or ""."""
    repeats = repeating(evidence)
    if len(repeats):
        return (
            f"Of {evidence.active.value} active latents {len(repeats)} can be told from the others "
            f"(R² up to {np.nanmax(evidence.repeated):.2f}; codes of dimension "
            f"{evidence.codes.value.value:.1f}): some repeat others."
        )
    if _too_many(evidence) > CROWDED_LATENTS:
        return (
            f"{evidence.active.value} active latents are {redundancy(evidence).value:.2g} times as "
            f"many as the dimension of their codes ({evidence.codes.value.value:.1f})."
        )
    return ""


def _crowded(evidence: Evidence) -> list[str]:
    """Signs of under-regularization."""
    found, ratio = list(filter(None, [_crowd(evidence)])), evidence.gamma_ratio
    far = {"": evidence.mmd2, " (active latents)": evidence.mmd2_active}
    for what, estimate in far.items():
        if _above(estimate, FAR):
            found.append(
                f"The aggregate posterior is far from the prior{what}: MMD² {estimate.value:.2g}."
            )
            break
    if ratio is not None and ratio < GAMMA_SMALL:
        found.append(f"γ is {ratio:.2g} times its stationary value: too small.")
    return found


def _not_balanced(evidence: Evidence) -> list[str]:
    """What keeps evidence without signs from being balance."""
    found, ratio, excess = [], evidence.gamma_ratio, redundancy(evidence)
    low, high = GAMMA_RANGE
    if evidence.gamma is None:
        found.append(
            "γ is not known: give gamma, or loss (how the loss weighs its terms), or x_hat_sampled"
        )
    elif not low < ratio < high:
        found.append(f"γ is {ratio:.3g} times its stationary value E‖x−x̂‖²/D")
    if evidence.structured > STRUCTURED_DOUBT:
        found.append(
            f"{evidence.structured:.1%} of the data's variance is left in structured directions"
        )
    if evidence.doubtful:
        found.append(
            "latents in doubt, active by one criterion and not by the other: "
            + ", ".join(map(str, evidence.doubtful))
        )
    if excess is None:
        found.append("no latent's posterior mean moves with x")
    elif _too_many(evidence):
        found.append(
            f"the active latents are {excess.value:.2g} times as many as the dimension of their "
            f"codes ({evidence.codes.value.value:.1f}), and none is a function of the others: "
            "codes on a closed curve or surface take one latent more, all others need not"
        )
    if np.nan_to_num(evidence.repeated).max() > REPEATED_DOUBT:
        found.append(
            f"a latent can in part be told from the others (R² {np.nanmax(evidence.repeated):.2f})"
        )
    if evidence.lost is not None and evidence.lost > LOST_DOUBT:
        found.append(
            f"a sampled z loses {evidence.lost:.1%} of the data's variance beyond white noise"
        )
    # Structure, not the dimension alone: observation noise has a dimension of its own.
    if _above(evidence.missing, MISSING) and evidence.structured > STRUCTURED_DOUBT / 2:
        found.append(
            f"the data's dimension ({evidence.data.value.value:.1f}) is above that of the codes "
            f"({evidence.codes.value.value:.1f})"
        )
    if max(evidence.mmd2.value, np.nan_to_num(evidence.mmd2_active.value)) > FAR:
        found.append("the aggregate posterior may be far from the prior")
    return found


def _advice_over(evidence: Evidence) -> str:
    idle = evidence.latents - max(evidence.active.value, evidence.informative.value)
    ratio = evidence.gamma_ratio
    if ratio is not None and ratio > DROWNED_RATIO:
        return (
            f"Lower γ (the KL weight): it is {ratio:.3g} times its stationary value "
            f"{evidence.gamma_stationary.value:.3g}; learn it along with the error, or if it is "
            "being learned, train on until it has come down."
        )
    if ratio is not None and ratio < GAMMA_SMALL:
        return (
            "Give the model more latents and let γ follow the error down from the data's largest "
            "variance: now γ is too small and the latents are too few."
        )
    if _crowd(evidence):
        return (
            "Train on, or give the networks more capacity, and judge again: latents repeat each "
            "other while x is badly reconstructed."
        )
    if idle == 0:
        return (
            f"Give the model more than {evidence.latents} latents: all are in use, and the "
            "residual still holds structure."
        )
    if evidence.missing is not None and evidence.missing.value < MISSING:
        return (
            f"The {evidence.active.value} active latents fit the data's dimension "
            f"({evidence.data.value.value:.1f}) and the error does not: train on with these "
            "latents, or give the decoder more capacity."
        )
    return (
        f"{idle} latents are idle while the residual holds structure that they could explain "
        "(Theorem 2's saddle): start γ at the data's largest variance and let it fall slowly, "
        "with skips from z to x̂, or train longer."
    )


def _advice_under(evidence: Evidence) -> str:
    target = max(round(evidence.codes.value.value), 1) if evidence.codes else 1
    return (
        f"Let γ start at the data's largest variance and fall slowly to E‖x−x̂‖²/D (latents opened "
        f"one by one), instead of small, fixed or fast: about {target} latents should do."
    )


def judge(evidence: Evidence) -> Verdict:
    """The verdict on evidence."""
    bad, crowded = _badly_reconstructed(evidence), _crowded(evidence)
    dimension = evidence.data.value.value
    many = evidence.informative.value > dimension + 0.5
    if (
        bad
        and crowded
        and many
        and evidence.structured < STRUCTURED_BOTH
        and not _drowned(evidence)
    ):
        return Verdict(UNDER, tuple(crowded + bad), (), _advice_under(evidence))
    if bad and crowded and many:
        return Verdict(
            UNDECIDED, tuple(bad + crowded),
            ("signs of both: more informative latents than the data's dimension, and a bad "
             "reconstruction",),
            "Train longer or give the networks more capacity before the balance is judged: the "
            "latents suffice, the reconstruction does not.",
        )  # fmt: skip
    if bad:
        return Verdict(OVER, tuple(bad), (), _advice_over(evidence))
    if crowded:
        return Verdict(UNDER, tuple(crowded), (), _advice_under(evidence))
    against = _not_balanced(evidence)
    if against:
        return Verdict(
            UNDECIDED, (), tuple(against),
            "No sign of collapse or crowding is clear; settle what is open: "
            + "; ".join(against) + ".",
        )  # fmt: skip
    number = evidence.informative_per_example.value
    each = f" ({number:.1f} in one example)" if evidence.intermittent else ""
    return Verdict(
        BALANCED,
        (
            f"{evidence.active.value} active latents{each}, codes of dimension "
            f"{evidence.codes.value.value:.1f}, nothing but noise left in the residual, γ at "
            f"{evidence.gamma_ratio:.2f} times its stationary value.",
        ),
        (),
        "Nothing needs to change; sample from the prior, and keep "
        f"{evidence.active.value} latents.",
    )
