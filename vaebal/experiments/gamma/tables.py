"""The tables of learned against fixed gamma: by r and arm, over all runs, and Table 2."""

from collections.abc import Sequence

import numpy as np

from vaebal.experiments.gamma import order
from vaebal.experiments.report import (
    Row,
    Table,
    column,
    rows_with,
    scaled,
    signed,
    with_spread,
)

# Table 2 of the paper (CelebA): pixels -> (Rec. Err., MMD) with gamma learned, and fixed.
PAPER = {64: ((60.5, 20.24), (59.6, 69.59)), 128: ((352.8, 93.3), (349.9, 291.8))}


def main_table(rows: Sequence[Row]) -> Table:
    """One line for every r and arm, over seeds."""
    bounded = all("nll" in row for row in rows)
    header = ["r", "arm", "γ", "Rec. Err.", "in training", "−ELBO", *(["NLL ≤"] if bounded else [])]
    header += [
        "active > .01",
        "σ² < ½",
        "= r",
        "MMD²",
        "MMD² (active)",
        "factor R²",
        "residual/γ",
        "γ off by",
    ]
    held_out = all("gamma_residual_test" in row for row in rows)  # rows of before 0.7 lack it
    header += ["on test images"] if held_out else []
    body = []
    for rank in order.ranks_of(rows):
        for arm in order.arms_of(rows_with(rows, rank=rank)):
            seeds = rows_with(rows, rank=rank, arm=arm)
            factors = [np.mean(row["factor_r2"]) for row in seeds if row["factor_r2"]]
            off = [np.mean(column(seeds, "gamma_residual_relative"))]
            if held_out:
                off.append(np.mean([row["gamma_residual_test"] / row["gamma"] for row in seeds]))
            body.append(
                [
                    *(str(rank or "?"), order.shown(arm), scaled(column(seeds, "gamma"))),
                    scaled(column(seeds, "error_mean")),
                    scaled(column(seeds, "error_train")),
                    with_spread(column(seeds, "negative_elbo"), 1),
                    *([with_spread(column(seeds, "nll"), 1)] if bounded else []),
                    with_spread(column(seeds, order.ACTIVE), 1),
                    with_spread(column(seeds, "informative"), 1),
                    *(order.count(seeds), scaled(column(seeds, "mmd"))),
                    scaled(column(seeds, "mmd_active")),
                    with_spread(factors, 2) if factors else "",
                    with_spread(column(seeds, "residual_over_gamma"), 2),
                    *(f"{100 * share:+.1f} %".replace("-", "−") for share in off),
                ]
            )
    return header, body


def summary_table(rows: Sequence[Row]) -> Table:
    """One line an arm, over every r and seed: balance, and what it costs."""
    header = ["arm", "active = r", "active − r", "MMD²", "γ off by, at most"]
    header += ["Rec. Err. ×", "−ELBO +", "in runs"]
    reference, body = order.reference(rows), []
    for arm in order.arms_of(rows):
        runs = rows_with(rows, arm=arm)
        excess = [row[order.ACTIVE] - row["rank"] for row in order.of_known_rank(runs)]
        beside = order.price(runs, reference)
        off = 100 * max(map(abs, column(runs, "gamma_residual_relative")))
        body.append(
            [
                *(order.shown(arm), order.count(runs), signed(excess, 2) if excess else ""),
                *(scaled(column(runs, "mmd")), f"{off:.1f} %"),
                with_spread([error for error, _ in beside], 2) if beside else "",
                signed([elbo for _, elbo in beside], 1) if beside else "",
                str(len(beside)),
            ]
        )
    return header, body


def paper_table(rows: Sequence[Row]) -> Table:
    """Table 2: the paper's two lines, then every pair of arms at every r."""
    header = ["data", "γ* from", "Rec. learned", "Rec. fixed", "Rec. ratio"]
    header += ["MMD learned", "MMD fixed", "MMD ratio", "−ELBO +"]
    body = []
    for pixels, ((error, mmd), (error_fixed, mmd_fixed)) in PAPER.items():
        line = [f"paper: CelebA, {pixels} px", "learned", f"{error}", f"{error_fixed}"]
        line += [f"{error_fixed / error:.3f}", f"{mmd}", f"{mmd_fixed}", f"{mmd_fixed / mmd:.2f}"]
        body.append([*line, ""])
    for arm in order.arms_of(rows, "fixed"):
        pairs = order.pairs_of(rows, arm)
        for rank in sorted({learned["rank"] for learned, _ in pairs}):
            seeds = [pair for pair in pairs if pair[0]["rank"] == rank]
            learned, fixed = zip(*seeds, strict=True)
            ratios, elbos = zip(*(order.compared(*pair) for pair in seeds), strict=True)
            body.append(
                [
                    learned[0]["data"] + (f", r = {rank}" if rank else ""),
                    *(order.source(arm), scaled(column(learned, "error_mean"))),
                    *(scaled(column(fixed, "error_mean")), with_spread(ratios, 3)),
                    *(scaled(column(learned, "mmd")), scaled(column(fixed, "mmd"))),
                    *(mmd_ratio(seeds), signed(elbos, 1)),
                ]
            )
    return header, body


def mmd_ratio(pairs: Sequence[tuple[Row, Row]]) -> str:
    """MMD² fixed over learned, a ratio a pair; a bound where a learned one may well be zero.

    The bound moves both by two standard errors and is the least of the pairs'.
    """
    if all(learned["mmd"] > 2 * learned["mmd_se"] for learned, _ in pairs):
        return scaled([fixed["mmd"] / learned["mmd"] for learned, fixed in pairs])
    least = min(
        (fixed["mmd"] - 2 * fixed["mmd_se"]) / (max(learned["mmd"], 0) + 2 * learned["mmd_se"])
        for learned, fixed in pairs
    )
    return f"> {scaled([least])}" if least > 0 else "–"
