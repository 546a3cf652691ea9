"""Whether `fit` finds the dimension: data sets of known r that nothing was tuned on.

python -m vaebal.estimator.validation [--out=results/fit] [--seed=200] [--sets=60]

Network, linear and drawn-scene manifolds, r = 1 to 12, N from 1,000 to 20,000, D from 10 to 768,
half of them with noise, every third one scaled and shifted. Seeds below 200 were used in tuning.
Beside them closed shapes, which no Gaussian prior covers without a cut. Finished sets are kept in
rows.json and not fitted again.
"""

import argparse
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from scipy import stats

from vaebal.data import rendered
from vaebal.estimator.balanced import BalancedVAE
from vaebal.training.workdir import write_atomically

KINDS = ("network", "linear", "rendered")
RANKS = (1, 2, 3, 4, 6, 8, 10, 12)
SIZES = (1_000, 2_000, 5_000, 10_000, 20_000)
# Closed shapes: their dimension r, and that of the space they lie in before it is bent.
CLOSED = {"circle": (1, 2), "sphere": (2, 3), "torus": (2, 3)}
DIMS = {"network": (20, 50, 192, 400), "linear": (10, 30, 192, 768), "rendered": (768,)}


class Known(NamedTuple):
    """A data set of known dimension."""

    kind: str
    rank: int
    examples: int
    dim: int
    noise: float  # standard deviation, as a share of the smallest factor's
    scale: float
    shift: float
    seed: int


def known(seed: int) -> Known:
    """The data set of a seed."""
    rng = np.random.default_rng(seed)
    kind = KINDS[seed % 3]
    dim = int(rng.choice(DIMS[kind]))
    rank = int(rng.choice([r for r in RANKS if 2 * r <= dim and (kind != "rendered" or r <= 6)]))
    # A curve of twelve dimensions is not to be known from a thousand points.
    sizes = [n for n in SIZES if n >= 500 * rank or (kind == "linear" and n >= 100 * rank)]
    noise = float(rng.choice([0.0, 0.01]))
    scale, shift = [(1.0, 0.0), (1000.0, -5e4), (1.0, 5.0)][(seed // 3) % 3]
    return Known(kind, rank, int(rng.choice(sizes)), dim, noise, scale, shift, seed)


def closed(seed: int) -> Known:
    """The closed shape of a seed, bent into 50 dimensions by a random network."""
    kind = list(CLOSED)[seed % 3]
    return Known(kind, CLOSED[kind][0], 5_000, 50, 0.0, 1.0, 0.0, seed)


def on_closed(kind: str, factors: np.ndarray) -> np.ndarray:
    """Points of a closed shape in [0, 1]^2 or ^3: evenly over the area, over the torus's angles.

    Args:
      factors: uniform on [0, 1], [N, r].
    """
    turn = 2 * np.pi * factors[:, :1]
    around = np.column_stack([np.cos(turn), np.sin(turn)])
    if kind == "circle":
        points = around
    elif kind == "sphere":  # Archimedes: the height is uniform
        height = 2 * factors[:, 1:] - 1
        points = np.column_stack([around * np.sqrt(1 - height**2), height])
    else:
        tube = 2 * np.pi * factors[:, 1:]
        points = np.column_stack([around * (1 + 0.5 * np.cos(tube)), 0.5 * np.sin(tube)]) / 1.5
    return (points + 1) / 2


def draw(of: Known) -> np.ndarray:
    """Its samples [N, D]."""
    factors = rendered.draw_factors(of.seed, jnp.arange(of.examples), of.rank)
    if of.kind in CLOSED:
        points = jnp.asarray(on_closed(of.kind, np.asarray(factors)))
        x = rendered.network_manifold(points, of.seed, 64, of.dim)
    elif of.kind == "network":
        x = rendered.network_manifold(factors, of.seed, 64, of.dim)
    elif of.kind == "linear":
        variances = jnp.geomspace(1.0, 0.1, of.rank)
        x = rendered.linear_manifold(factors, of.seed, variances, of.dim)
    else:
        side = int(np.sqrt(of.dim / 3))
        x = rendered.render(factors, side).reshape(of.examples, -1)
    x = np.asarray(x, np.float64)
    noise = np.random.default_rng(of.seed).normal(size=x.shape)
    return of.scale * (x + of.noise * noise) + of.shift


def fitted(of: Known) -> dict[str, Any]:
    """The row of a data set."""
    begun, X = time.perf_counter(), draw(of)
    vae = BalancedVAE().fit(X)
    return of._asdict() | {
        "dimension": vae.dimension_,
        "settled": vae.settled_,
        "error_share": vae.error_ / float(X.var(0).sum()),
        "gamma": vae.gamma_,
        "seconds": time.perf_counter() - begun,
    }


def page(rows: list[dict[str, Any]], sets: int) -> str:
    """table.md, of those finished of so many sets, and of closed shapes if there are any."""
    shapes = [row for row in rows if row["kind"] in CLOSED]
    rows = [row for row in rows if row["kind"] not in CLOSED]
    parts = _known_part(rows, sets) if rows else []
    if shapes:
        counts = Counter((row["kind"], row["rank"], row["dimension"]) for row in shapes)
        told = "; ".join(
            f"{k}, r = {r}: {d} latents in {n}" for (k, r, d), n in sorted(counts.items())
        )
        parts += [
            "## Closed shapes",
            f"**{told}.** A Gaussian prior is one piece without a hole: a closed shape of "
            "dimension r fits onto it with r + 1 latents, of which it uses a shell, or with r and "
            "a cut, at whose two sides one example has two codes. Here r is counted by angles, as "
            "in the table above it is by factors; the shapes are bent by a random network.",
            _table(shapes),
        ]
    seeds = f" --seed={min(row['seed'] for row in rows)} --sets={sets}" if rows else " --sets=0"
    parts.append(f"Command: `python -m vaebal.estimator.validation{seeds}`.")
    return "\n\n".join(parts) + "\n"


def _known_part(rows: list[dict[str, Any]], sets: int) -> list[str]:
    exact = [row["dimension"] == row["rank"] for row in rows]
    low, high = stats.binomtest(sum(exact), len(exact)).proportion_ci(method="wilson")
    seeds = [row["seed"] for row in rows]
    return [
        "# `fit` on data sets of known dimension",
        f"**dimension_ = r in {sum(exact)} of {len(exact)}** (Wilson 95 % interval {low:.2f} to "
        f"{high:.2f}), with no argument but the data; {len(rows)} of {sets} sets are done. Seeds "
        f"of the data: {min(seeds)} to {max(seeds)}; training seed 0; none was "
        "used in tuning (those were below 200). Noise is the standard deviation added to every "
        "feature; the error is held out, as a share of the variance. Seconds are of machines that "
        "did other work besides, on a core or two.",
        _table(rows),
    ]


def _table(rows: list[dict[str, Any]]) -> str:
    """A line a data set; a count that is not r in bold."""
    lines = [
        "| data | r | N | D | noise | scale | shift | dimension_ | settled | error | seconds |",
        "| :--- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | :--- | ---: | ---: |",
    ]
    lines += [
        f"| {row['kind']} | {row['rank']} | {row['examples']:,} | {row['dim']} | {row['noise']:g} "
        f"| {row['scale']:g} | {row['shift']:g} | "
        + (f"{row['dimension']}" if row["dimension"] == row["rank"] else f"**{row['dimension']}**")
        + f" | {'yes' if row['settled'] else 'no'} | {row['error_share']:.1e} "
        f"| {row['seconds']:.0f} |"
        for row in sorted(rows, key=lambda row: (row["kind"], row["rank"], row["seed"]))
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", default="results/fit")
    parser.add_argument("--seed", type=int, default=200)
    parser.add_argument("--sets", type=int, default=60)
    parser.add_argument("--closed", type=int, default=9, help="closed shapes, of seeds from 1000")
    given = parser.parse_args()
    file = Path(given.out) / "rows.json"
    rows = json.loads(file.read_text()) if file.exists() else []
    done = {row["seed"] for row in rows}
    sets = [known(given.seed + index) for index in range(given.sets)]
    sets += [closed(1000 + index) for index in range(given.closed)]
    for of in sets:
        if of.seed in done:
            continue
        row = fitted(of)
        rows = sorted([*rows, row], key=lambda row: row["seed"])
        write_atomically(file, json.dumps(rows, indent=1) + "\n")
        write_atomically(file.with_name("table.md"), page(rows, given.sets))
        told = {k: row[k] for k in ("kind", "rank", "examples", "dim", "noise", "dimension")}
        print(*(f"{k} {v}" for k, v in told.items()), f"{row['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
