"""Regularized autoencoders (eq. 6, Theorem 3): L_h from statistics, and its minima.

    L_h = h(||X - X_hat||_F^2 / (d n)) + (1/d) sum_k h(||z_k||^2 / n),   decoder in Theta,

z_k the k-th latent over the whole data set. L_h is a function of two means over the data,
not a mean over the data: a minibatch's L_h is biased, for every h but u. So `statistics`
and `energy` are apart here, and everything is full-batch.

The constraint. Theta must stop z -> 0 with a decoder that grows to compensate: here the
weights that leave a unit have norm one, in the linear decoder x_hat = W_x z the columns
of W_x. A zero column is a latent that does not exist: nothing moves it, so problems of
several kappa can be padded to one shape and stacked.

What the linear decoder can do
------------------------------
Only the data's second moment X^T X / n enters, and codes need only its row space, so
that r examples (`sufficient_examples`) stand for any number of rank r, free codes reach
no lower than a linear encoder (their projection on x's columns), and both are one problem.

Write s_k = ||z_k|| / sqrt(n), sigma_i for the singular values of X / sqrt(n). Among all
codes and unit columns that give X_hat exactly, sum_k h(s_k^2) is least

- at X_hat's SVD, where s = sigma, if s -> h(s^2) is concave (Rotfel'd's inequality);
- at s_k = (sum_i sigma_i) / kappa for all kappa rows if it is convex.

From which follow, derived here and held against numerics by the tests:

- Shrinking. From zero error, Z -> (1-t) Z costs h(t^2 E_0) - h(0), E_0 the data's mean
  square, and gains t (2/d) sum_k u_k h'(u_k) to first order. Bounded slope: the cost is
  of order t^2, so zero error is no minimum of any strictly increasing h. u^p: the cost
  is of order t^(2p), so it is none for p > 1/2 either, and the slope is infinite there.
- Splitting. A row in m equal parts costs m h(u / m^2) in place of h(u) with h(0) = 0, at
  most h'(0) u / m: with a bounded slope it pays for every kappa large enough, of the
  order of that slope.
- Sufficiency. If h and s -> h(s^2) are concave and h(0) = 0, every data set of rank r < d
  with kappa >= r has a global minimum of zero error and r rows. For the part e_i of
  sigma_i that X_hat leaves out, h(sigma_i^2) <= h((sigma_i - e_i)^2) + h(e_i^2), and
  (1/d) sum_i h(e_i^2) <= (r/d) h(sum_i e_i^2 / r) <= h(sum_i e_i^2 / d). For u^p with
  p < 1/2 all global minima are so; at p = 1/2 others tie, with as many as kappa rows.
"""

import dataclasses
import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from vaebal.models.nets import Activation, MLPEncoder
from vaebal.theory.penalties import Penalty, smooth

# ------------------------------------------------------------ statistics and energy


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["error", "rows"], meta_fields=["dim"]
)
@dataclasses.dataclass(frozen=True)
class Statistics:
    """All that eq. 6 sees of a data set and its autoencoder.

    Attributes:
      error: ||X - X_hat||_F^2 / (d n), the mean squared error per pixel; a scalar.
      rows: ||z_k||^2 / n [K], the mean square of each latent.
      dim: d.
    """

    error: Array
    rows: Array
    dim: int


def statistics(x: Array, x_hat: Array, z: Array) -> Statistics:
    """The statistics of a whole data set.

    Args:
      x: data [N, D].
      x_hat: reconstructions [N, D].
      z: latents [N, K].

    Raises:
      ValueError: shapes that would only match by broadcasting.
    """
    if np.ndim(x) != 2 or np.shape(x) != np.shape(x_hat):
        raise ValueError(f"x_hat must be [N, D] as x is, {np.shape(x)}, but is {np.shape(x_hat)}.")
    if np.ndim(z) != 2 or len(z) != len(x):
        raise ValueError(f"z must be [N, K] with x's N = {len(x)}, but has shape {np.shape(z)}.")
    return Statistics(jnp.square(x - x_hat).mean(), jnp.square(z).mean(0), x.shape[1])


def energy(penalty: Penalty, statistics: Statistics) -> Array:
    """Eq. 6, h(error) + (1/d) sum_k h(rows_k); a scalar, in h's own units."""
    return penalty.value(statistics.error) + penalty.value(statistics.rows).sum() / statistics.dim


def active_rows(rows: Array, threshold: float) -> Array:
    """How many latents are active: those whose mean square exceeds `threshold`.

    Args:
      rows: ||z_k||^2 / n [..., K].
      threshold: in units of rows, a small share of the data's variance; not of the largest
        row, as a collapsed model has none that is active. Dead rows end at zero or at the
        smoothing's size.
    """
    return (rows > threshold).sum(-1)


# ------------------------------------------------------------ linear decoders


class LinearAE(NamedTuple):
    """x_hat = z W_x^T with free codes; columns of W_x of norm one (or zero: no latent)."""

    W_x: Array  # [D, K]
    z: Array  # [N, K]


def linear_statistics(model: LinearAE, x: Array) -> Statistics:
    """`statistics` of a linear autoencoder on x [N, D]."""
    return statistics(x, model.z @ model.W_x.T, model.z)


def unit_columns(W: Array) -> Array:
    """W [D, K] with its columns scaled to norm one; zero columns stay zero."""
    norms = jnp.sqrt(jnp.square(W).sum(0, keepdims=True))
    return W / jnp.where(norms > 0, norms, 1.0)


def low_rank_data(key: Array, examples: int, dim: int, rank: int) -> Array:
    """[N, D] of rank exactly r: standard normal codes [N, r] times normal loadings [r, D]."""
    codes, loadings = jax.random.split(key)
    return jax.random.normal(codes, (examples, rank)) @ jax.random.normal(loadings, (rank, dim))


def isotropic_data(dim: int, rank: int, variance: float) -> Array:
    """[r, D]: r orthogonal directions of equal variance, singular values sqrt(variance r).

    Here every zero-error solution of exactly r rows has rows of at least `variance` each (those
    of an inverse of unit columns are no shorter than one), so the balanced solution's
    energy is known for every nondecreasing h, and no other balanced one is below it.
    """
    return jnp.sqrt(rank * jnp.asarray(variance, float)) * jnp.eye(rank, dim)


def sufficient_examples(x: Array, rank: int) -> Array:
    """r examples [r, D] with the second moment X^T X / n of x [N, D]: the same problem, small.

    Args:
      rank: r, at least the rank of x; what exceeds it is dropped, and no more
        than min(N, D) are made.
    """
    rank = min(rank, *x.shape)
    _, singular, directions = jnp.linalg.svd(x, full_matrices=False)
    scale = jnp.sqrt(rank / len(x))
    return scale * singular[:rank, None] * directions[:rank]


def balanced_solution(x: Array, kappa: int, rank: int) -> LinearAE:
    """Zero error with r rows: x's SVD on the first r of kappa latents.

    Args:
      x: [N, D] of rank r.
      kappa: at least r; the unused latents have unit columns and zero rows.

    Raises:
      ValueError: kappa < rank.
    """
    if kappa < rank:
        raise ValueError(f"kappa = {kappa} latents cannot hold data of rank {rank}.")
    left, singular, directions = jnp.linalg.svd(x, full_matrices=False)
    unused = jnp.zeros((x.shape[1], kappa - rank)).at[0].set(1.0)
    z = jnp.zeros((len(x), kappa)).at[:, :rank].set(left[:, :rank] * singular[None, :rank])
    return LinearAE(jnp.concatenate([directions[:rank].T, unused], 1), z)


def balanced_statistics(x: Array, kappa: int, rank: int) -> Statistics:
    """The statistics of `balanced_solution`, its error exactly zero.

    Rounding would leave 1e-32, and u^0.1 of that is 6e-4.
    """
    model = balanced_solution(x, kappa, rank)
    return dataclasses.replace(linear_statistics(model, x), error=jnp.zeros((), x.dtype))


def shrink(model: LinearAE, t: Array) -> LinearAE:
    """Z -> (1-t) Z: from zero error, the error t^2 E_0 for a gain in every row."""
    return model._replace(z=(1 - t) * model.z)


def split(model: LinearAE, parts: int) -> LinearAE:
    """Every latent in `parts` equal ones, the same x_hat: rows u -> `parts` rows u / parts^2."""
    return LinearAE(
        jnp.repeat(model.W_x, parts, axis=1), jnp.repeat(model.z / parts, parts, axis=1)
    )


def best_shrinkage(penalty: Penalty, at: Statistics, mean_square: float) -> float:
    """The t in [0, 1] at which Z -> (1-t) Z has the least energy; 0 where no t pays.

    By search over 20,000 values from 1e-12 to 1, evenly in log t, and 0.

    Args:
      at: statistics of a zero-error solution.
      mean_square: E_0 = ||X||_F^2 / (d n), so that the error is t^2 E_0.
    """
    t = np.concatenate([np.zeros(1), np.geomspace(1e-12, 1.0, 20_000)])
    rows = np.square(1 - t)[:, None] * np.asarray(at.rows)[None, :]
    with jax.enable_x64(True):
        costs = penalty.value(jnp.asarray(t**2 * mean_square)), penalty.value(jnp.asarray(rows))
    return float(t[np.argmin(np.asarray(costs[0]) + np.asarray(costs[1]).sum(1) / at.dim)])


def splitting_pays_from(penalty: Penalty, row: float, limit: int = 2**21) -> int | None:
    """The least number of equal parts in which a row of mean square `row` costs less than whole.

    m h(row / m^2) < h(row) + (m-1) h(0), the parts taking the place of m-1 dead rows.

    Returns:
      m >= 2, or None where s -> h(s^2) is concave or linear, and no m can pay.

    Raises:
      ValueError: no m up to `limit` pays, where some larger one may.
    """
    if penalty.norm_curvature in ("concave", "linear"):
        return None
    m = np.arange(2.0, limit + 1)
    with jax.enable_x64(True):  # the differences are far below float32's rounding
        zero = penalty.value(jnp.zeros(()))
        cost = m * np.asarray(penalty.value(jnp.asarray(row / m**2)) - zero)
        pays = cost < np.asarray(penalty.value(jnp.asarray(float(row))) - zero)
    if not pays.any():
        raise ValueError(f"splitting a row of {row} under {penalty.name}: no m <= {limit} pays.")
    return int(m[np.argmax(pays)])


class Minimum(NamedTuple):
    """The global minimum of eq. 6 with a linear decoder of unit columns."""

    energy: float
    error: float  # mean squared error per pixel


def linear_global_minimum(penalty: Penalty, x: Array, kappa: int) -> Minimum:
    """Eq. 6's least value over all unit columns and codes, exactly: no search over either.

    Concave or linear s -> h(s^2): zero error, sum of h(sigma_i^2). Convex: x_hat has
    soft-thresholded singular values (sigma_i - t)_+, spread evenly over kappa rows, and
    t alone is searched. See the module's docstring.

    Args:
      penalty: of concave, linear or convex norm_curvature.
      x: [N, D], of rank below D.
      kappa: at least the rank of x.

    Raises:
      ValueError: mixed curvature, for which no closed form is known; a rank that is too
        large for d or kappa.
    """
    sigma = np.linalg.svd(np.asarray(x, np.float64), compute_uv=False) / np.sqrt(len(x))
    rank, dim = int((sigma > 1e-10 * sigma[0]).sum()), x.shape[1]
    if rank > kappa or rank >= dim:
        raise ValueError(f"x has rank {rank}: eq. 6 is solved for rank <= kappa and rank < d.")

    def evaluate(error, rows) -> np.ndarray:
        with jax.enable_x64(True):
            at = penalty.value(jnp.asarray(error)), penalty.value(jnp.asarray(rows))
        return np.asarray(at[0]) + np.asarray(at[1]).sum(-1) / dim

    if penalty.norm_curvature in ("concave", "linear"):
        rows = np.zeros(kappa)
        rows[:rank] = sigma[:rank] ** 2
        return Minimum(float(evaluate(np.zeros(()), rows)), 0.0)
    if penalty.norm_curvature != "convex":
        raise ValueError(f"{penalty.name}: s -> h(s^2) is neither concave nor convex.")

    low, high = 1e-16 * sigma[0], sigma[0]
    for _ in range(8):  # each pass narrows the bracket a hundredfold
        t = np.geomspace(low, high, 401)[:, None]
        error = np.minimum(sigma, t) ** 2
        norm = np.maximum(sigma - t, 0).sum(1, keepdims=True) / kappa
        energies = evaluate(error.sum(1) / dim, np.repeat(norm**2, kappa, 1))
        best = int(np.argmin(energies))
        low, high = t[max(best - 2, 0), 0], t[min(best + 2, 400), 0]
    return Minimum(float(energies[best]), float(error[best].sum() / dim))


# ------------------------------------------------------------ minimising, linear


def homotopy(start: float | Array, end: float | Array, steps: int, share: float = 1.0) -> Array:
    """The smoothing of every step [steps]: geometrically from start to end, then at end.

    Args:
      share: of the steps that fall; the rest stay at `end`. start = end is no homotopy.
    """
    falling = jnp.minimum(jnp.arange(steps) / max(share * (steps - 1), 1), 1.0)
    return start * (end / start) ** falling


def random_columns(key: Array, dim: int, kappa: int | Array, padded: int) -> Array:
    """A start [D, K]: uniform unit columns, those beyond kappa (possibly traced) zero."""
    columns = unit_columns(jax.random.normal(key, (dim, padded)))
    return jnp.where((jnp.arange(padded) < kappa)[None, :], columns, 0.0)


def majorised_step(penalty: Penalty, model: LinearAE, x: Array) -> LinearAE:
    """One step that cannot raise eq. 6, and needs no step size.

    h is concave, so its tangents at the present error and rows lie above it. Their sum is
    a weighted ridge: minimised over all codes at once, then over the columns one by one,
    both in closed form. (Iteratively reweighted least squares, of which the homotopy is
    the usual companion.)

    Args:
      penalty: h, smoothed where its slope at zero is infinite.
      x: [N, D].
    """
    at = linear_statistics(model, x)
    # Only the ratio of the slopes enters: scale and translation of h do not.
    inverse_ridge = penalty.slope(at.error) / penalty.slope(at.rows)  # [K]
    # (W^T W + R)^-1 W^T = R^-1 W^T (W R^-1 W^T + I)^-1: a dead row's infinite ridge and a
    # vanishing one are both harmless in the second form.
    scaled = model.W_x * jnp.sqrt(inverse_ridge)[None, :]
    gram = scaled @ scaled.T + jnp.eye(x.shape[1], dtype=x.dtype)
    z = jnp.linalg.solve(gram, x.T).T @ model.W_x * inverse_ridge[None, :]

    def column(k: int, W: Array) -> Array:
        residual = x - z @ W.T + z[:, k, None] * W[None, :, k]
        best = residual.T @ z[:, k]
        norm = jnp.sqrt(jnp.square(best).sum())
        # A dead row leaves its column where it is.
        alive = norm > jnp.finfo(x.dtype).tiny
        return W.at[:, k].set(jnp.where(alive, best / jnp.where(alive, norm, 1.0), W[:, k]))

    return LinearAE(jax.lax.fori_loop(0, z.shape[1], column, model.W_x), z)


def minimise_linear(penalty: Penalty, x: Array, W_x: Array, smoothing: Array) -> LinearAE:
    """Minimises eq. 6 from decoder W_x [D, K], one `majorised_step` per entry of `smoothing`.

    Pure, for jit and vmap; float64 is meant. Smoothing that falls lowers the energy too,
    so the whole path descends.

    Args:
      x: [N, D]; `sufficient_examples` keeps N small.
      smoothing: eps of h(u + eps) at every step [T], see `homotopy`. Relative to the mean
        square of x's rows, so that data in other units take the same path under u^p.

    Raises:
      ValueError: a penalty that cannot be differentiated, or shapes that do not fit.
    """
    if not penalty.differentiable:
        raise ValueError(f"{penalty.name} is evaluated, not minimised.")
    if np.ndim(x) != 2 or np.ndim(W_x) != 2 or x.shape[1] != W_x.shape[0]:
        raise ValueError(f"W_x must be [D, K] for x [N, D] = {x.shape}, but is {W_x.shape}.")
    unit = jnp.square(x).sum() / len(x)

    def step(model: LinearAE, eps: Array) -> tuple[LinearAE, None]:
        return majorised_step(smooth(penalty, eps * unit), model, x), None

    model, _ = jax.lax.scan(step, LinearAE(W_x, x @ W_x), smoothing)
    return model


# ------------------------------------------------------------ deep decoders


class UnitFanOut(nn.Module):
    """A dense layer in which the weights that leave each input have norm one.

    The nonlinear kin of unit columns: no unit can be turned down and compensated later.
    """

    features: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x [B, I] -> [B, features]."""
        kernel = self.param(
            "kernel", nn.initializers.normal(1.0), (x.shape[-1], self.features), x.dtype
        )
        bias = self.param("bias", nn.initializers.zeros, (self.features,), x.dtype)
        return x @ unit_columns(kernel.T).T + bias[None, :]


class DeepAE(nn.Module):
    """A deterministic autoencoder, its decoder of `UnitFanOut` layers.

    Attributes:
      latents: K.
      outputs: D.
      width: units of each hidden layer.
      encoder_layers: at least 1.
      decoder_layers: at least 1, which is the linear decoder (and a bias).
    """

    latents: int
    outputs: int
    width: int
    encoder_layers: int
    decoder_layers: int
    activation: Activation

    def setup(self):
        self.encoder = MLPEncoder(self.latents, self.width, self.encoder_layers, self.activation)
        widths = [self.width] * (self.decoder_layers - 1)
        self.decoder = [UnitFanOut(width) for width in (*widths, self.outputs)]

    def __call__(self, x: Array) -> tuple[Array, Array]:
        """x [B, D] -> x_hat [B, D], z [B, K]."""
        z, _ = self.encoder(x)  # the mean; there is no posterior here
        h = self.decoder[0](z)
        for layer in self.decoder[1:]:
            h = layer(self.activation(h))
        return h, z


def fit_deep(
    penalty: Penalty,
    model: DeepAE,
    key: Array,
    x: Array,
    smoothing: Array,
    learning_rate: float,
) -> tuple[dict, Array]:
    """Full-batch Adam on eq. 6, one step per entry of `smoothing` [T]; for jit and vmap over keys.

    Args:
      x: the whole data set [N, D].
      smoothing: eps of h(u + eps) at every step, in the data's units.
      learning_rate: at the start; cosine decay to a hundredth.

    Returns:
      Parameters, and the energy before every step [T], with that step's smoothing.
    """
    if not penalty.differentiable:
        raise ValueError(f"{penalty.name} is evaluated, not minimised.")
    params = model.init(key, x[:1])["params"]
    params[f"decoder_{model.decoder_layers - 1}"]["bias"] = x.mean(0)  # as b_x = x_bar in eq. 3
    schedule = optax.cosine_decay_schedule(learning_rate, len(smoothing), 0.01)
    optimiser = optax.adam(schedule)

    def loss(params: dict, eps: Array) -> Array:
        return energy(smooth(penalty, eps), deep_statistics(model, params, x))

    def step(carry, eps):
        params, state = carry
        value, gradient = jax.value_and_grad(loss)(params, eps)
        updates, state = optimiser.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), value

    (params, _), energies = jax.lax.scan(step, (params, optimiser.init(params)), smoothing)
    return params, energies


def deep_statistics(model: DeepAE, params: dict, x: Array) -> Statistics:
    """`statistics` of a deep autoencoder on x [N, D]."""
    x_hat, z = model.apply({"params": params}, x)
    return statistics(x, x_hat, z)
