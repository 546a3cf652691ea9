"""The tables of the generation experiment: Tables 3 and 4 beside the paper's, and the stages.

Rows come one a method and seed; numbers of reconstructions begin with "rec_", of samples with
"gen_". "held-out images" is what a perfect sampler would score.
"""

from collections.abc import Sequence

import numpy as np

from vaebal.experiments.report import Row, Table, distinct, rows_with, short, with_spread

# Table 3 (FID of reconstructions and samples) and Table 4 (NDB/K for K = 100, 200, 300), CelebA.
PAPER_FID = {
    "Downsample": (39.2, 39.2),
    "WAE-MMD": (59.8, 66.9),
    "VAE": (45.9, 64.8),
    "VAE+": (45.6, 47.5),
}
PAPER_NDB = {
    "Downsample": (0.05, 0.06, 0.04),
    "WAE-MMD": (0.64, 0.62, 0.58),
    "VAE": (0.88, 0.85, 0.81),
    "VAE+": (0.29, 0.28, 0.24),
}
PAPER_BINS = (100, 200, 300)
PAPER_DATA = "celeb_a"
DISTANCES = {"fd": "FD (classifier)", "fid": "FID"}
ABSENT = "–"


def distances(rows: Sequence[Row]) -> list[str]:
    """Which Fréchet distances the rows hold."""
    return [name for name in DISTANCES if f"gen_{name}" in rows[0]]


def bins_of(rows: Sequence[Row]) -> list[int]:
    """Every K of NDB/K."""
    names = [name for name in rows[0] if name.startswith("gen_ndb_")]
    return sorted(int(name.rpartition("_")[2]) for name in names)


def known(seeds: Sequence[Row], name: str) -> list[float]:
    """A field's values in the rows that have it."""
    return [row[name] for row in seeds if row.get(name) is not None]


def cell(seeds: Sequence[Row], name: str, digits: int) -> str:
    """A field's mean and spread; "–" if no row has it."""
    values = known(seeds, name)
    return with_spread(values, digits) if values else ABSENT


def decimals(rows: Sequence[Row], name: str) -> int:
    """Decimals that show three figures of the smallest of the rows' numbers."""
    values = [abs(value) for value in known(rows, name) if value]
    return int(np.clip(2 - np.floor(np.log10(min(values, default=1.0))), 0, 4))


def _lines(rows: Sequence[Row], columns: dict[str, tuple[str, int]], theirs: dict) -> Table:
    """A line a method: columns {heading: (field, decimals)}, and the paper's `theirs`.

    Args:
      theirs: {heading: {method: text}}, each after the column of that heading.
    """
    header, body = ["method"], []
    for name in columns:
        header += [name, "paper"] if name in theirs else [name]
    for method in distinct(rows, "method"):
        seeds, line = rows_with(rows, method=method), [method]
        for name, (field, digits) in columns.items():
            line.append(cell(seeds, field, digits))
            if name in theirs:
                line.append(theirs[name].get(method, ABSENT))
        body.append(line)
    return header, body


def _paper(rows: Sequence[Row], numbers: dict, headings: Sequence[str], digits: int) -> dict:
    """The paper's columns by heading; none on data other than its own."""
    if rows[0]["data"] != PAPER_DATA:
        return {}
    return {
        heading: {method: f"{values[place]:.{digits}f}" for method, values in numbers.items()}
        for place, heading in enumerate(headings)
    }


def frechet_table(rows: Sequence[Row]) -> Table:
    """Table 3: reconstruction and generation, and how far the latents are from the prior."""
    columns, theirs = {}, _paper(rows, PAPER_FID, ("FID rec.", "FID gen."), 1)
    # FID has its columns, if absent, where the paper's numbers need them.
    for name in dict.fromkeys([*distances(rows), *(["fid"] if theirs else [])]):
        digits, title = decimals(rows, f"gen_{name}"), DISTANCES[name]
        columns |= {f"{title} {which}.": (f"{which}_{name}", digits) for which in ("rec", "gen")}
        columns[f"{title} gen., N → ∞"] = f"gen_{name}_extrapolated", digits
    columns["latents"] = "latents", 1
    columns |= {"Rec. Err.": ("error", 2), "MMD² to N(0, I)": ("mmd", 4)}
    return _lines(rows, columns, theirs)


def ndb_table(rows: Sequence[Row]) -> Table:
    """Table 4: NDB/K of samples (and of reconstructions), and the Jensen-Shannon divergence."""
    columns = {}
    for k in bins_of(rows):
        columns |= {f"NDB/{k} {which}.": (f"{which}_ndb_{k}", 2) for which in ("gen", "rec")}
        columns[f"JS gen., K = {k}"] = f"gen_js_{k}", 3
    return _lines(rows, columns, _paper(rows, PAPER_NDB, [f"NDB/{k} gen." for k in PAPER_BINS], 2))


def paper_table() -> Table:
    """The paper's Tables 3 and 4, for data other than its own."""
    header = ["CelebA 128", "FID rec.", "FID gen.", *(f"NDB/{k}" for k in PAPER_BINS)]
    body = [
        [method, *(f"{v:.1f}" for v in fids), *(f"{v:.2f}" for v in PAPER_NDB[method])]
        for method, fids in PAPER_FID.items()
    ]
    return header, body


def stage_table(stages: Sequence[Row]) -> Table:
    """What every stage's last epoch left, over seeds; gamma in brackets where it is implied."""
    header = ["stage", "parameters", "epochs", "steps", "loss", "error", "γ (implied)", "seconds"]
    body = []
    for stage in distinct(stages, "stage"):
        seeds = rows_with(stages, stage=stage)
        gamma, implied = known(seeds, "gamma"), known(seeds, "mean_square")
        shown = f"({short(np.mean(implied), 3)})" if implied else ABSENT
        body.append(
            [
                *(stage, f"{seeds[0]['parameters']:,}"),
                *(str(seeds[0]["epochs"]), str(seeds[0]["steps"])),
                *(cell(seeds, "loss", 3), cell(seeds, "squared_error", 3)),
                short(np.mean(gamma), 3) if gamma else shown,
                f"{np.mean(known(seeds, 'train_seconds')):.0f}",
            ]
        )
    return header, body
