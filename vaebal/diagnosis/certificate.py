"""`diagnose`: is a VAE balanced? From the arrays that any framework can give.

Shapes: N examples, D pixels, K latents.
"""

import dataclasses
import json
import math
import numbers
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vaebal.diagnosis.evidence import ACTIVE, INFORMATIVE, Evidence, collect
from vaebal.diagnosis.inputs import check
from vaebal.diagnosis.verdict import (
    FAR,
    LOST_DOUBT,
    REPEATED_DOUBT,
    STRUCTURED_DOUBT,
    judge,
    redundancy,
)
from vaebal.errors import InputError
from vaebal.measures.evaluation import Estimate

# Okabe and Ito's palette: told apart by colour-blind readers, and in print.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#999999"
GAMMA_SOURCES = {
    "given": "given",
    "loss": "implied by the loss",
    "response": "estimated from what noise in z does to x̂",
    "": "unknown",
}


@dataclasses.dataclass(frozen=True, repr=False)
class Certificate:
    """The verdict on a VAE and its evidence.

    Attributes:
      verdict: "balanced", "over-regularized", "under-regularized" or "undecided".
      reasons: sentences that speak for it.
      missing: of "undecided": what was not given, or stands against balance.
      advice: what to do next, one sentence.
      evidence: the numbers.
    """

    verdict: str
    reasons: tuple[str, ...]
    missing: tuple[str, ...]
    advice: str
    evidence: Evidence

    def __str__(self) -> str:
        e = self.evidence
        lines = [f"{self.verdict}: {e.samples} examples of {e.pixels} pixels, {e.latents} latents"]
        lines += [f"  because  {reason}" for reason in self.reasons]
        lines += [f"  open     {reason}" for reason in self.missing]
        lines += [f"  {name:<40} {value}" for name, value, _ in _rows(e)]
        return "\n".join([*lines, f"  next     {self.advice}"])

    __repr__ = __str__

    def markdown(self) -> str:
        """The certificate as a section of Markdown."""
        e = self.evidence
        return "\n".join(
            [
                f"## Verdict: {self.verdict}",
                "",
                *(f"- {reason}" for reason in self.reasons),
                *(f"- Open: {reason}." for reason in self.missing),
                "",
                f"**Next:** {self.advice}",
                "",
                f"| evidence ({e.samples} examples, D = {e.pixels}, K = {e.latents}) | value | "
                "in balance |",
                "| :--- | ---: | :--- |",
                *(
                    f"| {name} | {value} | {meant} |".replace("z|x", "z\\|x")
                    for name, value, meant in _rows(e)
                ),
                "",
                _latents_table(e),
                "",
                "Values ± standard errors over examples; nats; γ and errors in the squared unit "
                "of x.",
                "",
            ]
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything as Python numbers, lists and dictionaries; what is not finite is None."""
        return {
            "verdict": self.verdict,
            "reasons": list(self.reasons),
            "missing": list(self.missing),
            "advice": self.advice,
            "evidence": {
                field.name: _plain(getattr(self.evidence, field.name))
                for field in dataclasses.fields(self.evidence)
            }
            | {"gamma_ratio": _plain(self.evidence.gamma_ratio)},
        }

    def json(self) -> str:
        """`to_dict` as JSON."""
        return json.dumps(self.to_dict(), ensure_ascii=False, indent=1)

    def figure(self) -> Figure:
        """KL by latent, the two criteria, the residual's spectrum beside γ, and the counts."""
        figure = Figure(figsize=(9.5, 6.2), layout="constrained")
        panels = figure.subplots(2, 2)
        _draw_kl(panels[0, 0], self.evidence)
        _draw_criteria(panels[0, 1], self.evidence)
        _draw_spectra(panels[1, 0], self.evidence)
        _draw_counts(panels[1, 1], self.evidence)
        for panel in panels.flat:
            panel.spines[["top", "right"]].set_visible(False)
        figure.suptitle(f"{self.verdict}: {self.evidence.samples} examples", fontsize=11)
        return figure


def _plain(value: Any) -> Any:
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return {name: _plain(each) for name, each in value._asdict().items()}
    if isinstance(value, (tuple, list, np.ndarray)):
        return [_plain(each) for each in value]
    if isinstance(value, (bool, str)) or value is None:
        return value
    if isinstance(value, (int, np.integer)):
        return int(value)
    return float(value) if math.isfinite(value) else None


def _with_error(estimate: Estimate | None) -> str:
    if estimate is None or not math.isfinite(estimate.value):
        return "–"
    return f"{estimate.value:.3g} ± {estimate.error:.1g}"


def _percent(estimate: Estimate | None) -> str:
    if estimate is None:
        return "–"
    return f"{100 * estimate.value:.3g} ± {100 * estimate.error:.1g} %"


def _rows(e: Evidence) -> list[tuple[str, str, str]]:
    """(name, value, what it is in balance) of every number."""
    known = e.gamma is not None
    ratio = "–" if e.gamma_ratio is None else f"{e.gamma_ratio:.3g}"
    above = f"{e.top_residual.value / e.gamma:.3g}" if known else "–"
    lost = "–" if e.lost is None else f"{e.lost:.2%}"
    most = int(np.nan_to_num(e.repeated).argmax())
    told = _with_error(Estimate(e.repeated[most], e.repeated_error[most]))
    rows = [
        ("unexplained variance, at the mean", _percent(e.unexplained), "only noise"),
        ("unexplained variance, at a sampled z", _percent(e.unexplained_sampled), "only noise"),
        ("… in directions above noise", f"{e.structured:.2%}", f"below {STRUCTURED_DOUBT:.0%}"),
        ("lost at a sampled z, beyond white noise", lost, f"below {LOST_DOUBT:.1%}"),
        (f"active latents, Var(E[z|x]) > {ACTIVE}", _with_error(e.active), "the data's dimension"),
        (f"informative latents, σ² < {INFORMATIVE}", _with_error(e.informative), "the same"),
        ("doubtful latents, one criterion only", str(len(e.doubtful)), "0"),
        ("KL, all latents", _with_error(Estimate(float(e.kl.sum()), _total_error(e))), ""),
        ("MMD² to the prior", _with_error(e.mmd2), "near 0"),
        ("MMD² to the prior, active latents", _with_error(e.mmd2_active), f"below {FAR}"),
        (f"γ ({GAMMA_SOURCES[e.gamma_source]})", f"{e.gamma:.3g}" if known else "–", ""),
        ("γ by its response to noise in z", _with_error(e.gamma_response), "γ"),
        ("γ's stationary value E‖x−x̂‖²/D", _with_error(e.gamma_stationary), "γ"),
        ("γ over its stationary value", ratio, "1"),
        ("residual directions above γ", str(e.directions) if known else "–", "few, and weak"),
        ("largest residual variance over γ", above, ""),
        ("dimension of the data", _with_error(e.data.value), ""),
        ("… TwoNN, as published", _with_error(e.data.two_nn), ""),
        ("… maximum likelihood, as published", _with_error(e.data.maximum_likelihood), ""),
        ("dimension of the active codes", _with_error(e.codes and e.codes.value), "the data's"),
        ("redundancy: latents over codes", _with_error(redundancy(e)), "1"),
        ("most of a latent told by the others", told, f"below {REPEATED_DOUBT}"),
    ]
    if e.intermittent:
        rows.insert(
            6,
            (
                "informative in one example",
                _with_error(e.informative_per_example)
                + f" ({len(e.intermittent)} latents in some examples only)",
                "its part's dimension",
            ),
        )
    return rows


def _total_error(e: Evidence) -> float:
    """Of the summed KL, were latents independent."""
    return float(np.sqrt(np.square(e.kl_error).sum()))


def _state(e: Evidence, latent: int) -> str:
    if latent in e.doubtful:
        return "doubtful"
    return "active" if e.activity[latent] > ACTIVE else "idle"


def _latents_table(e: Evidence, most: int = 32) -> str:
    order = np.argsort(-e.kl)[:most]
    lines = [
        "| latent | KL (nats) | Var(E[z\\|x]) | σ² | examples with σ² < ½ | |",
        "| ---: | ---: | ---: | ---: | ---: | :--- |",
        *(
            f"| {k} | {_with_error(Estimate(e.kl[k], e.kl_error[k]))} | {e.activity[k]:.3g} | "
            f"{e.variance[k]:.3g} | {e.informed_share[k]:.0%} | {_state(e, k)} |"
            for k in order
        ),
    ]
    if e.latents > most:
        lines += ["", f"The {most} latents of largest KL, of {e.latents}."]
    return "\n".join(lines)


STATE_COLOURS = {"active": BLUE, "doubtful": ORANGE, "idle": GREY}


def _draw_kl(axes, e: Evidence) -> None:
    order = np.argsort(-e.kl)
    for state, colour in STATE_COLOURS.items():
        at = [place for place, k in enumerate(order) if _state(e, k) == state]
        if at:
            axes.bar(at, e.kl[order[at]], yerr=e.kl_error[order[at]], color=colour, label=state)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="latents, by KL", ylabel="KL (nats)")
    axes.legend(frameon=False, fontsize=8)


def _draw_criteria(axes, e: Evidence) -> None:
    for state, colour in STATE_COLOURS.items():
        at = [k for k in range(e.latents) if _state(e, k) == state]
        if at:
            axes.loglog(
                np.maximum(e.activity[at], 1e-8), e.variance[at], "o", color=colour, label=state
            )
    axes.axvline(ACTIVE, color="black", lw=0.8, ls=":")
    axes.axhline(INFORMATIVE, color="black", lw=0.8, ls=":")
    axes.set(xlabel="Var(E[z|x])", ylabel="σ²")


def _draw_spectra(axes, e: Evidence) -> None:
    for spectrum, name, colour in (
        (e.data_spectrum, "data", GREY),
        (e.residual_spectrum, "residual", BLUE),
    ):
        shown = spectrum[spectrum > 1e-12 * e.data_spectrum[0]]
        axes.loglog(np.arange(1, len(shown) + 1), shown, ".-", color=colour, label=name)
    if e.gamma is not None:
        axes.axhline(e.gamma, color=ORANGE, lw=1, label="γ")
    if e.gamma_stationary is not None:
        axes.axhline(e.gamma_stationary.value, color=GREEN, lw=1, ls="--", label="stationary γ")
    axes.set(xlabel="principal direction", ylabel="variance")
    axes.legend(frameon=False, fontsize=8)


def _draw_counts(axes, e: Evidence) -> None:
    bars = [
        ("latents K", Estimate(e.latents, 0.0), GREY),
        (f"active (> {ACTIVE})", e.active, BLUE),
        ("informative (σ² < ½)", e.informative, BLUE),
        ("data's dimension", e.data.value, GREEN),
        ("codes' dimension", e.codes.value if e.codes else Estimate(0.0, 0.0), GREEN),
    ]
    values = [estimate.value for _, estimate, _ in bars]
    axes.barh(
        range(len(bars)), values, xerr=[estimate.error for _, estimate, _ in bars],
        color=[colour for *_, colour in bars],
    )  # fmt: skip
    axes.set_yticks(range(len(bars)), [name for name, *_ in bars])
    for place, value in enumerate(values):
        axes.text(value, place, f" {value:.3g}", va="center", fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="number", xlim=(0, 1.15 * max(values)))


def diagnose(
    x: Any,
    x_hat: Any,
    mean: Any,
    log_var: Any = None,
    *,
    variance: Any = None,
    x_hat_sampled: Any = None,
    gamma: float | None = None,
    loss: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Certificate:
    """A verdict on the regularization balance of a VAE trained by any framework.

    Balanced: near-perfect reconstruction with as many active latents as the data has dimensions,
    the others at the prior, gamma stationary. Over-regularized: latents drowned in noise or
    collapsed, x badly reconstructed. Under-regularized: more latents in use than needed, or an
    aggregate posterior far from the prior. The rule and its thresholds: `vaebal.diagnosis.verdict`.

    Arrays are NumPy's or anything `np.asarray` takes (JAX arrays, PyTorch tensors on the CPU).
    Held-out examples say more than training examples; 2,000 are plenty. Neighbours are looked up
    among 2,000 examples, kernels and spectra taken over 4,000 and 2,000, drawn by `seed`.

    Args:
      x: [N, D], or images [N, ...], flattened. At least 100 examples.
      x_hat: the reconstruction at the posterior mean, like x, on x's scale.
      mean: posterior means [N, K] (or [N, ...], flattened).
      log_var: log posterior variances [N, K].
      variance: posterior variances [N, K], instead of log_var.
      x_hat_sampled: the reconstruction at one draw of z from the posterior, like x. With it
        gamma's stationary value is measured, and gamma itself is estimated where it is not given.
      gamma: the decoder's variance, if the model has one.
      loss: how the loss weighs its terms, the keywords of `implied_gamma` as a mapping (D and K
        are filled in), instead of gamma: {"kl_weight": 1e-3, "pixels": "mean"}.
      seed: of the draws of z, of the rows looked at, and of a shuffle.

    Raises:
      ValueError: one sentence on the first array or number that cannot be meant.
    """
    given = check(x, x_hat, mean, log_var, variance, x_hat_sampled)
    if not isinstance(seed, numbers.Integral) or seed < 0:
        raise InputError(f"seed={seed!r} must be an integer of at least 0.")
    evidence = collect(given, gamma, loss, int(seed))
    found = judge(evidence)
    return Certificate(found.name, found.reasons, found.missing, found.advice, evidence)
