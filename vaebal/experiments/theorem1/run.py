"""Theorem 1: the affine VAE's landscape mapped whole, beside what optimisers do on it."""

import itertools
import json
from pathlib import Path
from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from scipy import optimize

from vaebal.errors import InputError
from vaebal.experiments import checks, report
from vaebal.experiments.report import Row
from vaebal.streams import stream
from vaebal.theory import affine
from vaebal.training.checkpoints import open_workdir, write_atomically


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
    active = sum(v > config.model.gamma for v in eigenvalues[: config.model.kappa])
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
    points = affine.affine_stationary_points(mean, cov, kappa, gamma)
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


def describe(row: Row) -> str:
    """Which directions, 1 the data's largest, lie on the nonzero columns: "1, 2+3 on 2 columns"."""
    if not row["groups"]:
        return "none: total collapse"
    return ", ".join(
        "+".join(map(str, group["directions"]))
        + (f" on {group['columns']} columns" if group["columns"] > 1 else "")
        for group in row["groups"]
    )


def table(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """The stationary points, lowest first."""
    header = ["directions", "copies", "L − L*", "index", "index, measured", "least curvature"]
    header += ["largest gradient entry"]
    body = [
        [
            describe(row),
            str(row["copies"]),
            report.number(max(row["above_minimum"], 0.0), 4),
            str(row["index"]),
            str(row["measured_index"]),
            report.number(row["least_curvature"], 3),
            f"{row['largest_gradient']:.0e}".replace("-", "−"),
        ]
        for row in sorted(rows, key=lambda row: row["energy"])
    ]
    return header, body


def sentence(rows: list[Row], falls: np.ndarray, ways: dict[str, Any]) -> str:
    """What was seen, in one sentence, from the numbers alone."""
    agree = sum(row["index"] == row["measured_index"] for row in rows)
    reached = (falls[:, -1] < 1e-8).mean()
    copies = next(row["copies"] for row in rows if row["index"] == 0)
    return (
        f"Of {len(rows)} stationary points (up to order and sign of columns) {agree} have the "
        f"predicted index, and only {sum(row['index'] == 0 for row in rows)} is a minimum; "
        f"{reached:.0%} of {len(falls)} descents from near total collapse end there, and from one "
        f"of its {copies} copies to the next one climbs {max(ways['lowest']):.4f} (theory "
        f"{ways['saddle_theory']:.4f}) above it."
    )


def draw(
    config: Any, cov: np.ndarray, rows: list[Row], falls: np.ndarray, ways: dict[str, Any]
) -> plt.Figure:
    """Energies by index; descents past the saddles; three ways between two minima; gamma's path."""
    figure, axes = plt.subplots(1, 4, figsize=(15, 3.3))
    blue, orange, *_ = report.COLOURS

    for aligned, marker, label in ((True, "o", "on the axes"), (False, "x", "shared directions")):
        shown = [row for row in rows if row["axis_aligned"] == aligned]
        axes[0].plot(
            [row["measured_index"] for row in shown],
            [row["above_minimum"] for row in shown],
            marker, color=blue if aligned else orange, markersize=5, label=label,
        )  # fmt: skip
    axes[0].set(xlabel="negative curvatures (dense Hessian)", ylabel="L − L*")
    axes[0].set_title("every stationary point")
    axes[0].legend()

    for row in rows:
        if row["index"]:
            axes[1].axhline(row["above_minimum"], color="0.85", linewidth=0.7, zorder=0)
    for fall in falls[:60]:
        steps = np.arange(1, len(fall) + 1)
        axes[1].plot(steps, np.maximum(fall, 1e-10), color=blue, alpha=0.2, linewidth=0.8)
    axes[1].set(xscale="log", yscale="log", xlabel="gradient step", ylabel="L − L*")
    axes[1].set_ylim(1e-9, 100)
    axes[1].set_title(f"{len(falls)} descents; grey: the saddles")

    for name, colour in (("straight", "0.5"), ("rotation", orange), ("lowest", blue)):
        axes[2].plot(ways["t"], ways[name], color=colour, label=name)
    axes[2].axhline(ways["saddle_theory"], color=blue, linestyle=":", label="saddle (theory)")
    axes[2].set(xlabel="from one minimum to another", ylabel="L − L*")
    axes[2].set_title("a ridge between minima: two columns exchanged")
    axes[2].set_ylim(top=2.2 * max(ways["rotation"]))
    axes[2].legend(loc="upper right")

    largest = float(np.linalg.eigvalsh(cov)[-1])
    path = affine.affine_gamma_path(cov, config.model.kappa, np.geomspace(2 * largest, 1e-4, 400))
    axes[3].step(path.gamma, path.active, color=blue, where="mid")
    axes[3].set(xscale="log", xlabel="γ, falling →", ylabel="active columns")
    axes[3].yaxis.label.set_color(blue)
    axes[3].invert_xaxis()
    axes[3].set_title("the path of minima")
    error = axes[3].twinx()
    error.plot(path.gamma, path.squared_error_mean, color=orange)
    error.set(ylim=(0, None), ylabel="E‖x−x̂‖² at the posterior mean")
    error.yaxis.label.set_color(orange)
    error.grid(visible=False)
    for axis in axes:
        axis.title.set_fontsize(9)
    figure.tight_layout()
    return figure


def run(config: Any, workdir: str) -> list[Row]:
    """Maps the landscape, descends on it, walks between minima; writes and prints the report."""
    check(config)
    path = open_workdir(workdir, config.to_dict())
    mean, cov = covariance(config)
    rows = landscape_rows(config, mean, cov)
    falls = descents(config, cov)
    ways = paths(config, cov)
    _write(config, path, cov, rows, falls, ways)
    return rows


def _write(
    config: Any,
    path: Path,
    cov: np.ndarray,
    rows: list[Row],
    falls: np.ndarray,
    ways: dict[str, Any],
) -> None:
    header, body = table(rows)
    foot = (
        f"Data: covariance with eigenvalues {tuple(config.data.eigenvalues)}, κ = "
        f"{config.model.kappa}, γ = {config.model.gamma:g}; float64. Energies L are in eq. 3's "
        "units (twice −ELBO in nats, less constants), L* the least. Directions are numbered by "
        "falling eigenvalue; points that differ by order and sign of columns count once, with "
        "their number of copies. The index is the number of negative curvatures in all "
        "parameters: predicted by counting, and measured on the dense Hessian."
    )
    report.write_rows(rows, path, "rows")
    write_atomically(path / "paths.json", json.dumps(ways, indent=1) + "\n")
    report.save_figure(lambda: draw(config, cov, rows, falls, ways), path / "landscape.png")
    seen = sentence(rows, falls, ways)
    write_atomically(
        path / "table.md",
        f"# {config.name}: the affine VAE's stationary points\n\n"
        f"{report.markdown_table(header, body)}\n\n{seen}\n\n{foot}\n\n"
        f"![the landscape](landscape.png)\n\n"
        f"```json\n{json.dumps(config.to_dict(), indent=1)}\n```\n",
    )
    report.print_table(header, body, "stationary points of the affine VAE", grouped=False)
    print(f"{foot}\n\ntable {path / 'table.md'}\nfigure {path / 'landscape.png'}\n\n{seen}")
