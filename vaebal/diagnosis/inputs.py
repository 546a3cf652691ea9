"""What `diagnose` is given, checked and flattened: each mistake one sentence.

Shapes: N examples, D pixels, K latents.
"""

from typing import Any, NamedTuple

import numpy as np

from vaebal.errors import InputError

LEAST_SAMPLES = 100
# Pixel scales that are confused: x = a * x_hat + b, as (a, b) with what to say of it.
SCALES = {
    (255.0, 0.0): "x is on 0..255 and x_hat on 0..1",
    (1 / 255, 0.0): "x is on 0..1 and x_hat on 0..255",
    (2.0, -1.0): "x is on -1..1 and x_hat on 0..1",
    (0.5, 0.5): "x is on 0..1 and x_hat on -1..1",
    (127.5, 127.5): "x is on 0..255 and x_hat on -1..1",
    (1 / 127.5, -1.0): "x is on -1..1 and x_hat on 0..255",
}
# exp of a log variance beyond this is no posterior's.
LARGEST_LOG_VAR = 30.0


class Inputs(NamedTuple):
    """Float64 arrays of one N."""

    x: np.ndarray  # [N, D]
    x_hat: np.ndarray  # [N, D]
    mean: np.ndarray  # [N, K]
    log_var: np.ndarray  # [N, K]
    x_hat_sampled: np.ndarray | None  # [N, D]


def _array(name: str, value: Any) -> np.ndarray:
    """`value` as a float64 array of at least two axes, flattened to [N, ...]."""
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, RuntimeError) as error:
        raise InputError(
            f"{name} cannot be read as an array ({error}); give a NumPy array (of a tensor "
            "that is on a GPU or has a gradient: tensor.detach().cpu().numpy())."
        ) from error
    if np.ma.is_masked(value):
        raise InputError(f"{name} has masked values; leave those rows out of every array.")
    if array.dtype.kind not in "fiub" and array.dtype.name != "bfloat16":
        raise InputError(f"{name} has dtype {array.dtype}; give real numbers, in one array.")
    if array.ndim < 2:
        raise InputError(f"{name} has shape {array.shape}; give [N, ...], one row an example.")
    if 0 in array.shape:
        raise InputError(f"{name} has shape {array.shape}; give at least one value a row.")
    array = array.reshape(len(array), -1).astype(np.float64)
    bad = ~np.isfinite(array)
    if bad.any():
        row = int(np.argwhere(bad)[0, 0])
        raise InputError(
            f"{name} has a value that is not finite in row {row} ({int(bad.sum())} in all); "
            "remove those rows from every array."
        )
    return array


def _check_log_var(log_var: np.ndarray, mean: np.ndarray) -> None:
    largest = log_var.max()
    if largest > LARGEST_LOG_VAR:
        raise InputError(
            f"log_var reaches {largest:.3g}, a variance of exp({largest:.3g}); give the log of "
            "the posterior variance."
        )
    if log_var.min() < 0 or not log_var.any():  # all 0: each posterior as wide as the prior
        return
    # An aggregate posterior is about as wide as the prior: Var(mean) + sigma^2 is about 1.
    activity, values = mean.var(0), log_var.mean(0)
    as_variance, as_log = (
        np.abs(activity + spread - 1).sum() for spread in (values, np.exp(values))
    )
    if as_variance < as_log:
        raise InputError(
            f"log_var has no negative value (it lies in {log_var.min():.3g}..{largest:.3g}): "
            "these look like variances or standard deviations; give log_var=log(variance), or "
            "variance=."
        )


def _check_scale(x: np.ndarray, x_hat: np.ndarray) -> None:
    rows = slice(None, None, max(len(x) // 1000, 1))
    x, x_hat = x[rows].ravel(), x_hat[rows].ravel()
    plain = np.square(x - x_hat).mean()
    for (slope, shift), sentence in SCALES.items():
        # Within the spread of the data, and not merely smaller than before.
        error = np.square(x - slope * x_hat - shift).mean()
        if error < 0.1 * plain and error < x.var():
            raise InputError(
                f"x_hat fits x only after x_hat * {slope:.4g} + {shift:.4g} (its error falls from "
                f"{plain:.3g} to {error:.3g} a pixel): {sentence}; give both on one scale."
            )
    sizes = np.abs(x).max(), np.abs(x_hat).max()
    # About 0 a small x_hat is a collapsed one; among pixels that are never negative it is not.
    if sizes[0] * 50 < sizes[1] or (x.min() >= 0 and sizes[1] * 50 < sizes[0]):
        raise InputError(
            f"x reaches {sizes[0]:.3g} and x_hat {sizes[1]:.3g} in size; give both on one scale."
        )


def _log_variance(log_var: Any, variance: Any) -> np.ndarray:
    if (log_var is None) == (variance is None):
        raise InputError("log_var and variance are one quantity; give exactly one of them.")
    if variance is None:
        return _array("log_var", log_var)
    values = _array("variance", variance)
    if values.min() <= 0:
        raise InputError(
            f"variance has the value {values.min():.3g}: "
            + ("these look like log variances; pass them as log_var." if values.min() < 0 else
               "a variance is positive; a deterministic encoder has no posterior to diagnose.")
        )  # fmt: skip
    return np.log(values)


def check(x: Any, x_hat: Any, mean: Any, log_var: Any, variance: Any, x_hat_sampled: Any) -> Inputs:
    """The arrays of `diagnose`, flattened, float64.

    Raises:
      ValueError: one sentence that names the array, the value and the fix.
    """
    given = {"x": _array("x", x), "x_hat": _array("x_hat", x_hat), "mean": _array("mean", mean)}
    given["log_var"] = _log_variance(log_var, variance)
    if x_hat_sampled is not None:
        given["x_hat_sampled"] = _array("x_hat_sampled", x_hat_sampled)
    for name, other in (("x_hat", "x"), ("log_var", "mean"), ("x_hat_sampled", "x")):
        if name in given and given[name].shape != given[other].shape:
            raise InputError(
                f"{name} has shape {given[name].shape} (rows flattened) where {other} has "
                f"{given[other].shape}; give one row of the same size for each example."
            )
    if len(given["mean"]) != len(given["x"]):
        raise InputError(
            f"mean has {len(given['mean'])} rows where x has {len(given['x'])}; give the same "
            "examples in the same order."
        )
    if len(given["x"]) < LEAST_SAMPLES:
        raise InputError(
            f"x has {len(given['x'])} examples; give at least {LEAST_SAMPLES}, held-out ones if "
            "there are."
        )
    if not given["x"].var(0).sum():
        raise InputError("x has the same value in every row; give data that vary.")
    for name in ("x_hat", "x_hat_sampled"):
        if name in given and np.array_equal(given[name], given["x"]):
            raise InputError(f"{name} is x itself; give what the decoder makes of it.")
    if variance is None:
        _check_log_var(given["log_var"], given["mean"])
    _check_scale(given["x"], given["x_hat"])
    return Inputs(**({"x_hat_sampled": None} | given))
