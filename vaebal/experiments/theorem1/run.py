"""Theorem 1: the affine VAE's landscape mapped whole, beside what optimisers do on it."""

import itertools
from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
from scipy import optimize

from vaebal.errors import InputError
from vaebal.experiments import checks
from vaebal.experiments.report import Row
from vaebal.experiments.theorem1 import page
from vaebal.streams import stream
from vaebal.theory import affine
from vaebal.theory.landscape import affine_stationary_points
from vaebal.training.workdir import open_workdir


def check(config: Any) -> None:
    """Raises InputError for the first field that cannot be meant."""
    eigenvalues = config.data.eigenvalues
    if len(eigenvalues) < 2 or any(not np.isfinite(v) or v < 0 for v in eigenvalues):
        raise InputError(
            f"data.eigenvalues={eigenvalues!r} must be at least two finite numbers, none below 0."
        )
    checks.positive_integers(
        config, "model.kappa", "train.starts", "train.steps", "eval.points", "eval.path"
    )
    checks.positive_numbers(config, "model.gamma", "train.learning_rate")
    largest = sorted(eigenvalues, reverse=True)[: config.model.kappa]
    active = sum(v > config.model.gamma for v in largest)
    if active < 2:
        raise InputError(
            f"model.gamma={config.model.gamma} leaves {active} active column(s), and a path "
            "between two minima needs two: put it below the second of data.eigenvalues, and "
            "model.kappa above 1."
        )


def covariance(config: Any) -> tuple[np.ndarray, np.ndarray]:
    """Mean [D] and covariance [D, D] with the config's spectrum, in a random orientation."""
    eigenvalues = np.sort(np.asarray(config.data.eigenvalues, np.float64))[::-1]
    with jax.enable_x64(True):
        key = stream(config.data.seed, "theorem1/orientation")
        normal = np.asarray(jax.random.normal(key, (len(eigenvalues),) * 2))
    basis, _ = np.linalg.qr(normal)
    cov = (basis * eigenvalues) @ basis.T
    return np.zeros(len(eigenvalues)), (cov + cov.T) / 2


def landscape_rows(config: Any, mean: np.ndarray, cov: np.ndarray) -> list[Row]:
    """One row a stationary point: what the theory says of it, and what derivatives measure."""
    kappa, gamma = config.model.kappa, config.model.gamma
    least = float(affine.affine_global_minimum(cov, kappa, gamma))
    points = affine_stationary_points(mean, cov, kappa, gamma)
    rows = []
    with jax.enable_x64(True):
        example = affine.affine_global_minimizer(mean, cov, kappa, gamma)
        flat, unravel = jax.flatten_util.ravel_pytree(jax.tree.map(jnp.asarray, example))

        def energy(flat):
            return affine.affine_energy(unravel(flat), jnp.asarray(mean), jnp.asarray(cov), gamma)

        derivatives = jax.jit(lambda flat: (jax.grad(energy)(flat), jax.hessian(energy)(flat)))
        for point in itertools.islice(points, config.eval.points):
            flat, _ = jax.flatten_util.ravel_pytree(jax.tree.map(jnp.asarray, point.params))
            gradient, hessian = derivatives(flat)
            curvatures = np.linalg.eigvalsh(hessian)
            zero = 1e-9 * np.abs(curvatures).max()
            rows.append(
                {
                    "groups": [
                        {"directions": [d + 1 for d in g.directions], "columns": g.columns}
                        for g in point.groups
                    ],
                    "axis_aligned": point.axis_aligned,
                    "copies": point.copies,
                    "energy": point.energy,
                    "above_minimum": point.energy - least,
                    "index": point.index,
                    "measured_index": int((curvatures < -zero).sum()),
                    "nullity": point.nullity,
                    "measured_nullity": int((np.abs(curvatures) <= zero).sum()),
                    "least_curvature": float(curvatures[0]),
                    "largest_gradient": float(np.abs(gradient).max()),
                    "degenerate": point.degenerate,
                }
            )
    return rows


def descents(config: Any, cov: np.ndarray) -> np.ndarray:
    """Gradient descent on the profile energy from near total collapse: L - L* [starts, steps]."""
    kappa, gamma = config.model.kappa, config.model.gamma
    least = affine.affine_global_minimum(cov, kappa, gamma)
    with jax.enable_x64(True):
        cov = jnp.asarray(cov)
        shape = (config.train.starts, len(cov), kappa)
        starts = 1e-4 * jax.random.normal(stream(config.train.seed, "theorem1/starts"), shape)
        optimiser = optax.sgd(config.train.learning_rate)
        value_and_grad = jax.value_and_grad(
            lambda W: affine.affine_profile_energy(W, cov, jnp.asarray(gamma))
        )

        @jax.jit
        @jax.vmap
        def run(W):
            def step(carry, _):
                W, state = carry
                energy, gradient = value_and_grad(W)
                updates, state = optimiser.update(gradient, state)
                return (W + updates, state), energy

            return jax.lax.scan(step, (W, optimiser.init(W)), length=config.train.steps)[1]

        return np.asarray(run(starts)) - least


def paths(config: Any, cov: np.ndarray) -> dict[str, Any]:
    """Energy along three ways from a global minimum to the one with two columns exchanged.

    straight: the line between them. rotation: the columns turned into each other, which
    keeps W W^T, so that only sum log d_k pays. lowest: the two norms are optimised at every
    angle; its top is the saddle where both directions share both columns, so that this
    height is what any path must climb within the plane of the two.
    """
    kappa, gamma = config.model.kappa, config.model.gamma
    eigenvalues, vectors = np.linalg.eigh(cov)
    top = np.argsort(eigenvalues)[::-1][:2]
    rest = np.array(affine.affine_global_minimizer(np.zeros(len(cov)), cov, kappa, gamma).W_x)
    # The minimiser's columns by falling eigenvalue: the first two are replaced along the way.
    lengths = np.sqrt(eigenvalues[top] - gamma)
    least = float(affine.affine_global_minimum(cov, kappa, gamma))

    def above(pair: np.ndarray) -> float:
        rest[:, :2] = pair
        return float(affine.affine_profile_energy(rest, cov, gamma)) - least

    def turned(lengths: np.ndarray, angle: float) -> np.ndarray:
        c, s = np.cos(angle), np.sin(angle)
        return (vectors[:, top] * lengths) @ np.array([[c, s], [-s, c]])

    def lowest(angle: float) -> float:
        found = optimize.minimize(
            lambda logs: above(turned(np.exp(logs), angle)), np.log(lengths), tol=1e-12
        )
        return float(found.fun)

    t = np.linspace(0, 1, config.eval.path)
    start, end = turned(lengths, 0.0), turned(lengths, np.pi / 2)
    d = eigenvalues[top]
    delta = (np.sqrt(d).sum() / 2) ** 2  # the shared norm's |w|^2 + gamma at the saddle
    # F at the saddle less F at the minimum: C's two eigenvalues become sqrt(lambda_i delta).
    mu = np.sqrt(d * delta)
    saddle = (d / mu).sum() + 2 * np.log(delta) - (2 + np.log(d).sum())
    return {
        "t": t.tolist(),
        "straight": [above((1 - s) * start + s * end) for s in t],
        "rotation": [above(turned(lengths, s * np.pi / 2)) for s in t],
        "lowest": [lowest(s * np.pi / 2) for s in t],
        "rotation_theory": float(2 * np.log(d.mean()) - np.log(d).sum()),
        "saddle_theory": float(saddle),
    }


def run(config: Any, workdir: str) -> list[Row]:
    """Maps the landscape, descends on it, walks between minima; writes and prints the report."""
    check(config)
    path = open_workdir(workdir, config.to_dict())
    mean, cov = covariance(config)
    rows = landscape_rows(config, mean, cov)
    falls = descents(config, cov)
    ways = paths(config, cov)
    page.write(config, path, cov, rows, falls, ways)
    return rows
