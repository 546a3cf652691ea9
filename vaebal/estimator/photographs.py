"""`fit` on photographs of known dimension: turntable films, faces under light from known places.

python -m vaebal.estimator.photographs --films=FOLDER [--faces=FILE.npz] [--out=results/photographs]

FOLDER holds a folder of photographs a film, in the order of their names: one turn each, so one
closed curve. FILE holds "images" [N, H, W, 1] uint8, "subject" [N], "light_azimuth" and
"light_elevation" [N] in degrees: two factors a person. Finished sets are not fitted again.
--credit=TEXT stands below the figure, where the photographs' licence asks for it.
"""

import argparse
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image
from sklearn.model_selection import LeaveOneOut, cross_val_predict
from sklearn.neighbors import KNeighborsRegressor

from vaebal.data.photos import square
from vaebal.errors import InputError
from vaebal.estimator.balanced import BalancedVAE
from vaebal.training.workdir import load_arrays, save_arrays, write_atomically

SIDE = 32  # pixels a side that the photographs are reduced to


class Photographs(NamedTuple):
    """Photographs of something that moves in a known way."""

    kind: str  # "film", "face"
    name: str
    images: np.ndarray  # [N, H, W, C], uint8
    factors: np.ndarray  # [N, F], what R^2 is measured of
    counts: tuple[int, ...]  # numbers of latents that the topology allows


def films(folder: Path) -> list[Photographs]:
    """A film a folder; the factors are cosine and sine of the angle.

    A circle takes two latents, or one with a cut, at whose two sides one photograph has two codes.

    Raises:
      InputError: no folder, none in it, or a file that is no photograph of `SIDE` pixels or more.
    """
    inside = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    if not inside:
        raise InputError(
            f"--films={folder} is no folder that holds a folder of photographs a film."
        )
    found = []
    for film in inside:
        images = np.stack([_photograph(path) for path in sorted(film.iterdir())])
        angle = 2 * np.pi * np.arange(len(images)) / len(images)
        factors = np.stack([np.cos(angle), np.sin(angle)], 1)
        found.append(Photographs("film", film.name, images, factors, (1, 2)))
    return found


def _photograph(file: Path) -> np.ndarray:
    """[SIDE, SIDE, 3] uint8."""
    try:
        return square(file, SIDE)
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be used ({error}): move it out of the film.") from error


def faces(file: Path) -> list[Photographs]:
    """A person a set; the factors are the sines of the light's azimuth and elevation.

    Raises:
      InputError: no such file, or one without these arrays.
    """
    try:
        with np.load(file) as archive:
            names = ("images", "subject", "light_azimuth", "light_elevation")
            held = {name: archive[name] for name in names}
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"--faces={file} cannot be used ({error}): give an .npz file of images, subject, "
            "light_azimuth and light_elevation."
        ) from error
    found = []
    for subject in np.unique(held["subject"]):
        own = held["subject"] == subject
        whole = map(Image.fromarray, held["images"][own].squeeze(-1))
        resized = [image.resize((SIDE, SIDE), Image.Resampling.LANCZOS) for image in whole]
        images = np.stack(list(map(np.asarray, resized)))[..., None]
        degrees = np.stack([held["light_azimuth"][own], held["light_elevation"][own]], 1)
        factors = np.sin(np.radians(degrees))
        found.append(Photographs("face", f"person {subject}", images, factors, (2,)))
    return found


def held_out_r2(z: np.ndarray, factors: np.ndarray, neighbours: int = 3) -> list[float]:
    """R^2 of every factor [N, F] from latents [N, K], each sample by its neighbours among others.

    Neighbours in z, whose distances weigh them.
    """
    if not z.shape[1]:
        return [0.0] * factors.shape[1]
    nearest = KNeighborsRegressor(neighbours, weights="distance")
    predicted = cross_val_predict(nearest, z, factors, cv=LeaveOneOut())
    return (1 - np.square(predicted - factors).mean(0) / factors.var(0)).tolist()


def fitted(of: Photographs) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The row of a set, and what its figure shows."""
    begun, x = time.perf_counter(), of.images / 255.0
    vae = BalancedVAE().fit(x)
    z = vae.transform(x)
    row = {
        "kind": of.kind,
        "name": of.name,
        "images": len(x),
        "counts": list(of.counts),
        "dimension": vae.dimension_,
        "settled": vae.settled_,
        "gamma": vae.gamma_,
        "error": vae.error_,
        "variance": float(x.var(0).sum()),
        "factor_r2": held_out_r2(z, of.factors),
        "seconds": time.perf_counter() - begun,
    }
    steps = np.linspace(-2, 2, 9)
    lines = [np.tile(z.mean(0), (9, 1)) for _ in range(vae.dimension_)]
    for latent, line in enumerate(lines):
        line[:, latent] = steps
    shown = {"z": z, "traversals": np.stack([vae.inverse_transform(line) for line in lines])}
    return row, shown


def _found(rows: list[dict[str, Any]], kind: str) -> str:
    """How often the count is allowed, and how well each factor is held, in films or faces."""
    own = [row for row in rows if row["kind"] == kind]
    if not own:
        return ""
    name = {"film": "turntable films", "face": "persons under moving light"}[kind]
    right = [row for row in own if row["dimension"] in row["counts"]]
    said = f"**{len(right)} of {len(own)} {name} have a count that the topology allows.**"
    if len(right) < len(own):
        above = Counter(row["dimension"] for row in own if row not in right)
        said += (
            f" The others: {', '.join(f'{d} latents in {n}' for d, n in sorted(above.items()))}."
        )
    medians = []
    for count in sorted({row["dimension"] for row in own}):
        r2 = np.median([row["factor_r2"] for row in own if row["dimension"] == count], 0)
        medians.append(f"{', '.join(f'{each:.2f}' for each in r2)} with {count}")
    return f"{said} Factor R², medians: {'; '.join(medians)} latents."


def table(rows: list[dict[str, Any]]) -> str:
    """table.md."""
    said = [
        "# `fit` on photographs of known dimension",
        f"{' '.join(_found(rows, kind) for kind in ('film', 'face')).strip()} With no argument "
        f"but the photographs, at {SIDE} × {SIDE} pixels in [0, 1]. A film is one turn of a "
        "turntable: a closed curve, which takes two latents or one with a cut. A face is one "
        "person under light from two known angles. Error: Σ(x − x̂)² over pixels at the posterior "
        "mean, of the tenth that was held out, and as a share of the variance. Factor R²: cosine "
        "and sine of the film's angle, sines of azimuth and elevation, each photograph's from its "
        "three nearest neighbours among the others' latents. Training seed 0.",
        "Command: `python -m vaebal.estimator.photographs --films=FOLDER --faces=FILE.npz`.",
    ]
    lines = [
        "| set | photographs | dimension_ | allowed | settled | held-out error | share of variance "
        "| factor R² | seconds |",
        "| :--- | ---: | ---: | ---: | :--- | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        allowed = " or ".join(map(str, row["counts"]))
        share = row["error"] / row["variance"]
        r2 = ", ".join(f"{value:.2f}" for value in row["factor_r2"])
        lines.append(
            f"| {row['name']} | {row['images']} | {row['dimension']} | {allowed} "
            f"| {'yes' if row['settled'] else 'no'} | {row['error']:.2f} | {share:.3f} | {r2} "
            f"| {row['seconds']:.0f} |"
        )
    return "\n\n".join(said) + "\n\n" + "\n".join(lines) + "\n"


def draw(shown: dict[str, dict[str, np.ndarray]]) -> plt.Figure:
    """A film a row: its latents over the angle, and one latent varied, a strip each."""
    figure, axes = plt.subplots(
        len(shown), 2, figsize=(9, 1.5 * len(shown)), squeeze=False, width_ratios=(1, 2.6),
        layout="constrained",
    )  # fmt: skip
    for (name, each), (left, right) in zip(shown.items(), axes, strict=True):
        degrees = 360 * np.arange(len(each["z"])) / len(each["z"])
        left.plot(degrees, each["z"], linewidth=0, marker=".", markersize=2)
        left.set_xticks([0, 180, 360])
        left.set_ylabel(name, fontsize=7, rotation=0, ha="right", va="center")
        strips = [np.concatenate(list(line), 1) for line in each["traversals"]]
        right.imshow(np.clip(np.concatenate(strips, 0), 0, 1), aspect="equal")
        right.set_axis_off()
    axes[-1, 0].set_xlabel("angle (degrees)")
    axes[0, 0].set_title("latents", fontsize=9)
    axes[0, 1].set_title("one latent a strip, from −2 to 2", fontsize=9)
    return figure


def draw_films(out: Path, rows: list[dict[str, Any]], credit: str) -> str:
    """Draws films.png of all finished films, where what it shows is kept; returns its lines."""
    names = [row["name"] for row in rows if row["kind"] == "film"]
    kept = {name: out / "films" / f"{name}.npz" for name in names}
    if all(file.exists() for file in kept.values()) and names:
        figure = draw({name: load_arrays(file) for name, file in kept.items()})
        figure.savefig(out / "films.png", dpi=80)
        plt.close(figure)
    if not (out / "films.png").exists():
        return ""
    shown = "\n![Latents over the angle, and one latent a strip](films.png)\n"
    return shown + (f"\n{credit}\n" if credit else "")


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--films", default="")
    parser.add_argument("--faces", default="")
    parser.add_argument("--credit", default="")
    parser.add_argument("--out", default="results/photographs")
    given = parser.parse_args()
    out = Path(given.out)
    rows_file = out / "rows.json"
    rows = json.loads(rows_file.read_text()) if rows_file.exists() else []
    sets = films(Path(given.films)) if given.films else []
    sets += faces(Path(given.faces)) if given.faces else []
    if not sets:
        raise InputError("Give --films=FOLDER, --faces=FILE.npz, or both.")
    for each in sets:
        if each.name in {row["name"] for row in rows}:
            continue
        row, pictures = fitted(each)
        if each.kind == "film":
            save_arrays(out / "films" / f"{each.name}.npz", **pictures)
        rows = [*rows, row]
        write_atomically(rows_file, json.dumps(rows, indent=1) + "\n")
        write_atomically(out / "table.md", table(rows))
        print(f"{row['name']}: {row['dimension']} latents, {row['seconds']:.0f} s", flush=True)
    write_atomically(out / "table.md", table(rows) + draw_films(out, rows, given.credit))


def main() -> None:
    """The program; bad input is one sentence, and exit code 2."""
    try:
        _main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(InputError.exit_code)


if __name__ == "__main__":
    main()
