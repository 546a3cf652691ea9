"""The verdict of `diagnose` on every VAE of a finished run: `vaebal diagnose RUN`.

An experiment that trains VAEs has a function `trained(config, workdir)`, which gives them one after
the other. Shapes: N examples, D pixels, K latents.
"""

import functools
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array
from ml_collections import ConfigDict

from vaebal.data import some_indices
from vaebal.diagnosis import Certificate, diagnose
from vaebal.errors import InputError
from vaebal.experiments import check_config, report
from vaebal.models import GaussianVAE, latent_noise
from vaebal.streams import stream
from vaebal.training.workdir import read_json, workdir_path, write_atomically

WITH_VAES = ("gamma", "generation", "kappa_sweep", "latent_diffusion")
MOST = 2_000  # held-out examples that a verdict is on
BLOCK = 100  # decoded at a time
METHOD = (
    "On {examples:,} examples that were not trained on, drawn at random, with x̂ at the mean and at "
    "one sampled z and with γ. Dimensions are TwoNN's and maximum likelihood's, calibrated: of the "
    "data, and of the active latents' means. Told by others: of the latent that the other active "
    "ones tell best, the share of its variance. Unexplained: E‖x−x̂‖² over the data's variance. "
    "docs/diagnose.md says how the verdict is found. Command: `vaebal diagnose WORKDIR`, of a run "
    "of {name}; vaebal {version}."
)


class Trained(NamedTuple):
    """A VAE of a run, and what it was not trained on."""

    name: str
    model: GaussianVAE
    params: Any  # with log gamma; latents that were never opened as training had them
    latents: int  # in the model, of model.latents
    rows: Array  # [N, ...], as stored
    decode: Callable[[Array], Array]  # rows -> x [N, D]


@functools.partial(jax.jit, static_argnames=("model", "decode"))
def _outputs(model: GaussianVAE, decode: Callable, params: Any, latents: int, rows: Any) -> tuple:
    eps = latent_noise(stream(0, "diagnose"), len(rows), model.latents)

    def one(given: tuple[Array, Array]) -> tuple[Array, ...]:
        row, noise = given
        x = decode(row[None])
        outputs = model.apply({"params": params}, x, noise[None], latents)
        at_mean = model.apply({"params": params}, outputs.mean, method="decode")
        arrays = x, at_mean, outputs.x_hat, outputs.mean, outputs.log_var
        return tuple(array[0] for array in arrays)

    return jax.lax.map(one, (rows, eps), batch_size=BLOCK)


def outputs(vae: Trained, rows: np.ndarray) -> list[np.ndarray]:
    """Of stored rows: x, x_hat at the mean and at one sampled z [N, D]; means and log variances
    [N, K].
    """
    found = _outputs(vae.model, vae.decode, vae.params, vae.latents, rows)
    return [np.asarray(array) for array in found]


def verdict(vae: Trained) -> Certificate:
    """`diagnose` of a trained VAE, on rows that it was not trained on.

    Raises:
      InputError: there are too few of them, or they do not vary.
    """
    rows = np.asarray(vae.rows[some_indices(len(vae.rows), MOST, "diagnose")])
    x, x_hat, sampled, mean, log_var = outputs(vae, rows)
    gamma = float(np.exp(vae.model.apply({"params": vae.params}, method="log_gamma")))
    return diagnose(x, x_hat, mean, log_var, x_hat_sampled=sampled, gamma=gamma)


HEADER = (
    *("VAE", "verdict", "active > .01", "σ² < ½", "dimension of the data", "of the codes"),
    *("told by others", "unexplained", "γ ratio", "why"),
)


def _cells(name: str, certificate: Certificate) -> list[str]:
    e = certificate.evidence
    told = np.nanmax(e.repeated, initial=-np.inf)
    return [
        name, certificate.verdict, f"{e.active.value:.0f}", f"{e.informative.value:.0f}",
        *("–" if of is None else f"{of.value.value:.1f}" for of in (e.data, e.codes)),
        f"{told:.2f}" if np.isfinite(told) else "–", f"{100 * e.unexplained.value:.1f} %",
        report.short(e.gamma_ratio),
        "; ".join(said.rstrip(".") for said in (*certificate.reasons, *certificate.missing)),
    ]  # fmt: skip


def of_run(workdir: str) -> Iterator[tuple[str, Certificate]]:
    """The verdict on every VAE of the finished run in `workdir`, one after the other.

    Raises:
      InputError: no run is there, or one of another version or without VAEs.
      CheckpointError: it is not finished.
    """
    path = workdir_path(workdir)
    if not (path / "config.json").exists():
        raise InputError(f"{workdir} holds no run (it has no config.json): name a --workdir.")
    config = ConfigDict(read_json(path / "config.json"), convert_dict=True)
    check_config(config, workdir)
    if config.experiment not in WITH_VAES:
        raise InputError(
            f"{workdir} is a run of {config.experiment!r}, which keeps no VAEs to be judged: of "
            f"{sorted(WITH_VAES)} there are."
        )
    module = importlib.import_module(f"vaebal.experiments.{config.experiment}.run")
    vae = None
    for vae in module.trained(config, workdir):
        yield vae.name, verdict(vae)
    if vae is None:
        raise InputError(
            f"{workdir} has no VAE to be judged: none reconstructs what it reads, or all stopped."
        )


def write(workdir: str, found: list[tuple[str, Certificate]]) -> Path:
    """Leaves verdicts.md in the run's folder, prints its table, and returns its path."""
    body = [_cells(*each) for each in found]
    path = workdir_path(workdir)
    config = read_json(path / "config.json")
    about = {"name": config["name"], "version": report.versions()["vaebal"]}
    text = [
        f"# {config['name']} on {config['data']['name']}: the verdicts of `diagnose`",
        report.markdown_table(HEADER, body),
        METHOD.format(examples=found[0][1].evidence.samples, **about),
    ]
    write_atomically(path / "verdicts.md", "\n\n".join(text) + "\n")
    report.print_table(HEADER, body, "Verdicts", without=("why",), grouped=False)
    return path / "verdicts.md"
