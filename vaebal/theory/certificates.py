"""Is a point stationary, and of what kind: a verdict, and what it rests on.

- "not stationary": the gradient's norm is above the tolerance.
- "strict saddle": some direction has negative curvature. One is enough, so that this
  holds whether or not anything else converged. Maxima are included.
- "minimum": all eigenvalues are positive.
- "degenerate": none is negative, some are zero, and second order is silent: a flat
  valley, x^4 and a monkey saddle look alike.
- "undecided": of large models only, no negative curvature was found in the products
  allowed, and the smallest eigenvalue had not converged.

Losses, parameters and precision are as in `vaebal.theory.hessian`.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.flatten_util import ravel_pytree

from vaebal.theory.gradients import Params
from vaebal.theory.hessian import (
    Loss,
    check_at_least,
    check_positive,
    checked,
    dense,
    on_host,
    rayleigh,
    symmetric_eigh,
)
from vaebal.theory.lanczos import Extremes, extreme_eigenvalues


@functools.partial(jax.jit, static_argnames="loss")
def _gradient_norm(loss: Loss, params: Params, args: tuple) -> tuple[Array, Array]:
    with jax.default_matmul_precision("highest"):
        value, gradient = jax.value_and_grad(loss)(params, *args)
    return value, jnp.linalg.norm(ravel_pytree(gradient)[0])


def _value_and_gradient_norm(loss: Loss, params: Params, args: tuple) -> tuple[float, float]:
    value, norm = (float(x) for x in _gradient_norm(loss, params, args))
    if not (math.isfinite(value) and math.isfinite(norm)):
        raise ValueError(
            f"loss is {value} with a gradient of norm {norm} at params; both must be finite."
        )
    return value, norm


Verdict = Literal["minimum", "strict saddle", "degenerate", "not stationary", "undecided"]

_MEANING: Mapping[str, str] = {
    "minimum": "every eigenvalue of the Hessian is positive: a strict local minimum",
    "strict saddle": "a direction of negative curvature leads down (a maximum counts as one)",
    "degenerate": "no negative eigenvalue, but zero ones: second order cannot tell a minimum "
    "from a saddle here",
    "not stationary": "the gradient is above the tolerance; the Hessian was not looked at",
    "undecided": "no negative curvature found, but the smallest eigenvalue did not converge",
}

_EXPECTATION: Mapping[str, str] = {
    "exact": "The loss holds its expectation over noise exactly; the caller says so.",
    "sampled": "The loss is a sample of an expectation over noise: all of this is about that "
    "sample, and another draw moves gradient and eigenvalues.",
    "not stated": "The loss is deterministic. If it holds draws of noise, all of this is about "
    "those draws.",
}


@dataclasses.dataclass(frozen=True, eq=False)
class Certificate:
    """What `certify` found at a point, and what that rests on. Print it."""

    verdict: Verdict
    loss: float
    gradient_norm: float
    tolerance: float  # of the gradient norm
    parameters: int  # P
    method: str
    assumptions: tuple[str, ...]
    # Of the Hessian, which is not looked at where the point is not stationary.
    smallest: float = math.nan  # least eigenvalue found
    smallest_residual: float = math.nan  # an eigenvalue lies within it of `smallest`
    largest: float = math.nan
    largest_residual: float = math.nan
    zero_band: float = math.nan  # |eigenvalue| up to this counts as zero
    index: int | None = None  # eigenvalues below -zero_band, where all were computed
    index_bounds: tuple[int, int] | None = None  # of negative eigenvalues: certainly, and possibly
    zero_modes: int | None = None  # eigenvalues within the band, where all were computed
    direction: Params | None = None  # unit eigenvector of `smallest`, like params

    def __str__(self) -> str:
        relation = "<=" if self.gradient_norm <= self.tolerance else ">"
        lines = [
            f"{self.verdict}: {_MEANING[self.verdict]}.",
            f"  loss {self.loss:.10g}, {self.parameters:,} parameters",
            f"  gradient norm {self.gradient_norm:.3g} {relation} tolerance {self.tolerance:.3g}",
        ]
        if self.index_bounds is not None:
            for end in ("smallest", "largest"):
                found, residual = getattr(self, end), getattr(self, f"{end}_residual")
                lines.append(f"  {end} eigenvalue {found:.8g} (residual {residual:.1g})")
            if self.index is not None:
                lines.append(f"  index {self.index}, zero modes {self.zero_modes}")
            else:
                low, high = self.index_bounds
                lines.append(f"  index at least {low} and at most {high}")
        return "\n".join([*lines, "assumed:", *(f"  - {line}" for line in self.assumptions)])


class _Spectrum(NamedTuple):
    """What is known of the Hessian's eigenvalues."""

    eigenvalues: np.ndarray  # all of them, or those in a Krylov space: [m] ascending
    ends: tuple[float, float]  # smallest and largest
    residuals: tuple[float, float]  # of these
    direction: Params  # unit eigenvector of the smallest
    settled: bool  # whether the smallest has converged
    rounding: float  # the Hessian's measured asymmetry
    method: str


def _all_eigenvalues(loss: Loss, params: Params, args: tuple, size: int) -> _Spectrum:
    flat, unravel = ravel_pytree(params)
    hessian = on_host(dense(loss, params, args, min(64, size)))
    eigenvalues, vectors = symmetric_eigh(hessian)
    ends = jnp.asarray(vectors.T[[0, -1]], flat.dtype)
    values, residuals = jax.device_get(rayleigh(loss, params, args, ends))
    rounding = float(np.linalg.norm(hessian - hessian.T))
    method = f"dense Hessian, all {size} eigenvalues"
    return _Spectrum(eigenvalues, values, residuals, unravel(ends[0]), True, rounding, method)


def _both_ends(found: Extremes) -> _Spectrum:
    return _Spectrum(
        found.ritz_values,
        (found.smallest.values[0], found.largest.values[0]),
        (found.smallest.residuals[0], found.largest.residuals[0]),
        jax.tree.map(lambda leaf: leaf[0], found.smallest.vectors),
        bool(found.smallest.converged[0]),
        found.asymmetry,
        f"block Lanczos, {found.products} Hessian-vector products",
    )


def _verdict(of: _Spectrum, band: float, negative: int) -> Verdict:
    if negative:
        return "strict saddle"
    if not of.settled:
        return "undecided"
    return "minimum" if of.ends[0] - of.residuals[0] > band else "degenerate"


def _assumptions(
    of: _Spectrum, verdict: Verdict, tolerance: float, band: float, exact: bool, seed: int
) -> list[str]:
    lines = [
        f"A gradient norm up to {tolerance:.3g} counts as zero: a stationary point is taken to "
        "lie close by, with eigenvalues of the same signs.",
        f"Eigenvalues within {band:.3g} of zero count as zero.",
        "The loss is twice differentiable at the point: kinks, such as a ReLU's, are not seen.",
        f"Method: {of.method}.",
    ]
    if not exact:
        lines.append(
            "Counts are those of a subspace, and so bounds: of negative eigenvalues there are "
            "at least as many as found, and at most as many as were not found positive."
        )
        if verdict != "strict saddle":
            lines.append(
                "That no eigenvalue lies below the smallest one found rests on a random "
                f"starting block (seed {seed}), not on a certificate."
            )
    return lines


def _completed(
    certificate: Certificate, of: _Spectrum, zero_tolerance: float, seed: int
) -> Certificate:
    """The certificate of a stationary point, with its Hessian's part."""
    size = certificate.parameters
    band = max(zero_tolerance * float(np.abs(of.eigenvalues).max()), of.rounding)
    negative = max(int((of.eigenvalues < -band).sum()), int(of.ends[0] < -band))
    positive = int((of.eigenvalues > band).sum())
    exact = len(of.eigenvalues) == size
    verdict = _verdict(of, band, negative)
    assumed = _assumptions(of, verdict, certificate.tolerance, band, exact, seed)
    return dataclasses.replace(
        certificate,
        verdict=verdict,
        smallest=float(of.ends[0]),
        smallest_residual=float(of.residuals[0]),
        largest=float(of.ends[1]),
        largest_residual=float(of.residuals[1]),
        zero_band=band,
        index=negative if exact else None,
        index_bounds=(negative, size - positive),
        zero_modes=size - negative - positive if exact else None,
        direction=of.direction,
        method=of.method,
        assumptions=(*certificate.assumptions, *assumed),
    )


def certify(
    loss: Loss,
    params: Params,
    tolerance: float,
    *,
    args: tuple = (),
    zero_tolerance: float | None = None,
    dense_limit: int = 3000,
    expectation: Literal["exact", "sampled", "not stated"] = "not stated",
    seed: int = 0,
    **search: Any,
) -> Certificate:
    """Is `params` a stationary point of `loss(params, *args)`, and of what kind?

    The verdicts are in the module's docstring.

    Args:
      tolerance: gradient norm up to which the point is stationary.
      zero_tolerance: an eigenvalue counts as zero up to this times the largest
        |eigenvalue| (and never below the Hessian's measured asymmetry). None: the square
        root of the precision's epsilon, 1.5e-8 in float64 and 3.5e-4 in float32.
      dense_limit: up to so many parameters the Hessian is built and diagonalised and the
        index is exact (3,000 take 72 MB and some ten seconds in float64); above,
        `extreme_eigenvalues` bounds it.
      expectation: what the loss holds of an expectation over noise. Only the caller
        knows; it is repeated in the assumptions.
      seed, search: of `extreme_eigenvalues`: count (2), basis, max_products.

    Raises:
      ValueError: a bad argument, by name; a loss, gradient or Hessian that is not finite.
    """
    params, size = checked(loss, params, args)
    dtype = jnp.result_type(*jax.tree.leaves(params))
    if zero_tolerance is None:
        zero_tolerance = math.sqrt(float(jnp.finfo(dtype).eps))
    check_positive(tolerance=tolerance, zero_tolerance=zero_tolerance)
    check_at_least(0, dense_limit=dense_limit)
    if expectation not in _EXPECTATION:
        raise ValueError(f"expectation must be one of {[*_EXPECTATION]}, but is {expectation!r}.")
    value, norm = _value_and_gradient_norm(loss, params, args)
    precision = f"Computed in {dtype}, matrix products at JAX's highest precision."
    assumed = _EXPECTATION[expectation], precision
    found = Certificate("not stationary", value, norm, tolerance, size, "gradient", assumed)
    if norm > tolerance:
        return found
    if size <= dense_limit:
        return _completed(found, _all_eigenvalues(loss, params, args, size), zero_tolerance, seed)
    options = {"count": 2, "tolerance": 1e-3, "floor": 0.1 * zero_tolerance} | search
    ends = extreme_eigenvalues(loss, params, args=args, seed=seed, **options)
    return _completed(found, _both_ends(ends), zero_tolerance, seed)
