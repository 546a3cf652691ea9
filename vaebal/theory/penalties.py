"""Penalties h of eq. 6: functions of a mean square u >= 0, their slopes, and which are bounded.

    u,  log(1+u),  u/(u+eps),  sqrt(u),  u^p,  log(u+eps),  I[u>0]

Each is what its formula says, without weight or offset: a h + b has the minimisers of h
in eq. 6, so a family up to scale and translation has one member here. All are
nondecreasing and all but the indicator are concave in u, so that a tangent lies above
them (which `vaebal.theory.regularized_ae.minimise_linear` needs).

Two things decide what h does in eq. 6. One is its slope at zero: Theorem 3 asks for an
infinite one. The other is the curvature of s -> h(s^2), h as a function of a latent's
norm: concave is sufficient for balance with a linear decoder, as `vaebal.theory.regularized_ae`
explains. u^0.75 has the first and not the second.
"""

import dataclasses
import math
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

CURVATURES = ("concave", "linear", "convex", "mixed")


@dataclasses.dataclass(frozen=True)
class Penalty:
    """One h of eq. 6.

    Attributes:
      name: its formula, as `named` reads it.
      value: h(u), elementwise on any shape; u >= 0, where h is defined.
      slope: h'(u), elementwise; inf at u = 0 where that is its limit.
      slope_at_zero: the limit of (h(u) - h(0)) / u as u falls to 0; may be inf.
      norm_curvature: of s -> h(s^2) on s >= 0, one of `CURVATURES`.
      differentiable: False for the indicator, which is evaluated only: its slope is 0
        wherever there is one, and tells a minimiser nothing.
    """

    name: str
    value: Callable[[Array], Array]
    slope: Callable[[Array], Array]
    slope_at_zero: float | Array
    norm_curvature: str
    differentiable: bool = True

    @property
    def bounded(self) -> bool:
        """Whether the slope at zero is finite: then Theorem 3 denies it any guarantee."""
        return math.isfinite(self.slope_at_zero)


def identity() -> Penalty:
    """h(u) = u: the ridge. Slope 1."""
    return Penalty("u", lambda u: u, jnp.ones_like, 1.0, "convex")


def log1p() -> Penalty:
    """h(u) = log(1+u). Slope 1 at zero."""
    return Penalty("log(1+u)", jnp.log1p, lambda u: 1 / (1 + u), 1.0, "mixed")


def ratio(eps: float) -> Penalty:
    """h(u) = u/(u+eps), which saturates at 1. Slope 1/eps at zero.

    Raises:
      ValueError: eps is not a finite number above 0.
    """
    _require_positive("eps", eps)
    return Penalty(
        f"u/(u+{_text(eps)})",
        lambda u: u / (u + eps),
        lambda u: eps / jnp.square(u + eps),
        1 / eps,
        "mixed",
    )


def power(p: float | Array) -> Penalty:
    """h(u) = u^p, 0 < p <= 1. Infinite slope at zero for every p < 1.

    `p` may be traced, so that a sweep over p is one program; its threshold values
    (slope_at_zero, norm_curvature) are then those of p < 1/2, and not to be read.

    Raises:
      ValueError: p is not in (0, 1].
    """
    if isinstance(p, jax.core.Tracer):
        at_zero, curvature, name = math.inf, "concave", "u^p"
    else:
        if not 0 < p <= 1:
            raise ValueError(f"p = {p} must lie in (0, 1]: above 1 the slope at zero is 0.")
        at_zero, name = (1.0 if p == 1 else math.inf), f"u^{_text(float(p))}"
        curvature = "concave" if p < 0.5 else "linear" if p == 0.5 else "convex"
    return Penalty(
        name, lambda u: jnp.power(u, p), lambda u: p * jnp.power(u, p - 1), at_zero, curvature
    )


def sqrt() -> Penalty:
    """h(u) = sqrt(u), the square-root lasso's: u^p at its threshold p = 1/2."""
    return Penalty("sqrt(u)", jnp.sqrt, lambda u: 0.5 / jnp.sqrt(u), math.inf, "linear")


def log(eps: float) -> Penalty:
    """h(u) = log(u+eps). Slope 1/eps at zero: finite, and as steep as one likes.

    Raises:
      ValueError: eps is not a finite number above 0 (log u itself has no value at zero).
    """
    _require_positive("eps", eps)
    return Penalty(
        f"log(u+{_text(eps)})",
        lambda u: jnp.log(u + eps),
        lambda u: 1 / (u + eps),
        1 / eps,
        "mixed",
    )


def indicator(tolerance: float = 0.0) -> Penalty:
    """h(u) = I[u > tolerance]: the count of active latents. Evaluated, not differentiated.

    Above 0 a tolerance lets the numbers' rounding pass for zero, and small rows too: h is flat
    there, and enough parts of a row cost nothing.

    Raises:
      ValueError: tolerance is not 0 or a finite number above it.
    """
    if tolerance != 0:
        _require_positive("tolerance", tolerance)
    return Penalty(
        f"I[u>{_text(tolerance)}]",
        lambda u: (u > tolerance).astype(jnp.result_type(u, float)),
        lambda u: jnp.zeros_like(u, jnp.result_type(u, float)),
        0.0 if tolerance else math.inf,
        "mixed" if tolerance else "concave",
        differentiable=False,
    )


def smooth(penalty: Penalty, eps: float | Array) -> Penalty:
    """h(u + eps): no infinite slope is left, so that gradients at an exactly zero u are finite.

    The homotopy of section 5 starts at an eps of the size of the data and lets it fall.
    It moves a finite slope too, as log(u+1e-6) needs it no less than sqrt(u).

    Args:
      penalty: any but the indicator.
      eps: at least 0, possibly traced; 0 gives `penalty` back.

    Raises:
      ValueError: the penalty is not differentiable, or eps is negative or not finite.
    """
    if not penalty.differentiable:
        raise ValueError(f"{penalty.name} cannot be smoothed: it is evaluated, not differentiated.")
    if not isinstance(eps, jax.core.Tracer):
        if eps == 0:
            return penalty
        _require_positive("eps", eps)
    slope = penalty.slope(jnp.asarray(eps, float))
    return dataclasses.replace(
        penalty,
        value=lambda u: penalty.value(u + eps),
        slope=lambda u: penalty.slope(u + eps),
        slope_at_zero=slope if isinstance(slope, jax.core.Tracer) else float(slope),
        # (s^2 + eps)^p is convex in s for p >= 1/2; any shift of u is flat in s at s = 0.
        norm_curvature="convex" if penalty.norm_curvature in ("convex", "linear") else "mixed",
    )


_NUMBER = r"(\d+\.?\d*(?:e[+-]?\d+)?|\.\d+(?:e[+-]?\d+)?)"
_FORMULAS: tuple[tuple[str, Callable[..., Penalty]], ...] = (
    ("u", identity),
    (r"log\(1\+u\)", log1p),
    (rf"u/\(u\+{_NUMBER}\)", ratio),
    (r"sqrt\(u\)", sqrt),
    (rf"u\^{_NUMBER}", power),
    (rf"log\(u\+{_NUMBER}\)", log),
    (rf"I\[u>{_NUMBER}\]", indicator),
)


def named(formula: str) -> Penalty:
    """The penalty of a formula: "u", "log(1+u)", "u/(u+0.1)", "sqrt(u)", "u^0.25", ...

    Raises:
      ValueError: no such formula, or a constant out of range.
    """
    text = formula.replace(" ", "")
    for pattern, build in _FORMULAS:
        if match := re.fullmatch(pattern, text):
            return build(*map(float, match.groups()))
    raise ValueError(
        f"{formula!r} is no penalty: use u, log(1+u), u/(u+EPS), sqrt(u), u^P, log(u+EPS) or "
        "I[u>TOLERANCE], with numbers for the capitals."
    )


def _text(value: float) -> str:
    """A constant as short as it goes: 0.25, 1e-6."""
    mantissa, exponent = f"{value:.5e}".split("e")
    scientific = f"{float(mantissa):g}e{int(exponent)}"
    return min(f"{value:g}", scientific, key=len)


def _require_positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} = {value} must be a finite number above 0.")
