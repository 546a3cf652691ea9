"""The experiment on gamma's descent, end to end on a tiny problem, and its parts by themselves."""

import dataclasses
import functools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import (
    celeba64_gamma,
    celeba128_gamma,
    folder_gamma,
    network_gamma,
    rendered64_gamma,
)
from vaebal.data import manifold, some_indices
from vaebal.errors import Diverged, InputError
from vaebal.experiments import verdicts
from vaebal.experiments.cells import Cells
from vaebal.experiments.gamma import arms as gamma_arms
from vaebal.experiments.gamma import evaluate as gamma_evaluate
from vaebal.experiments.gamma import fields
from vaebal.experiments.gamma import page as gamma_report
from vaebal.experiments.gamma import run as gamma
from vaebal.measures.factors import factor_r2, factor_shares
from vaebal.models import init_params, prior_samples
from vaebal.streams import stream
from vaebal.training import Optimisation, gaussian_vae, state_shapes
from vaebal.training.checkpoints import Checkpoints
from vaebal.training.step import init_state

ARMS = (
    *("adaptive", "fixed at adaptive", "settled after adaptive", "plain 1e-2 after adaptive"),
    *("learned 1e-2", "adam 1e-2", "annealed 1.0 to adaptive"),
)
RANKS, SEEDS, STEPS = (1, 2), (0, 1), 8


def tiny(**changes):
    """A config of seconds; `changes` are of dotted fields, with __ for the dot."""
    config = fields.defaults("tiny")
    settings = {
        "data__name": "linear", "data__resolution": 8, "data__ranks": RANKS,
        "data__train_size": 64, "data__test_size": 32, "model__network": "mlp",
        "model__latents": 4, "model__width": 16, "train__arms": ARMS, "train__seeds": SEEDS,
        "train__epochs": 2, "train__batch_size": 16, "train__warmup_steps": 2,
        "train__fastest": 0.5,
        "train__epochs_per_checkpoint": 2, "eval__block": 16, "eval__train_images": 32,
        "eval__mmd_samples": 32, "eval__pictures": 4, "eval__nll_samples": 64,
    }  # fmt: skip
    for name, value in (settings | changes).items():
        config.update_from_flattened_dict({name.replace("__", "."): value})
    return config


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(workdir, rows by (arm, r, seed))."""
    path = tmp_path_factory.mktemp("gamma")
    rows = gamma.run(tiny(), str(path))
    return path, {(row["arm"], row["rank"], row["seed"]): row for row in rows}


def test_its_vaes_are_those_that_the_rows_tell_of(finished):
    path, rows = finished
    found = list(gamma.trained(tiny(), str(path)))
    assert len(found) == len(rows)
    for vae, ((arm, rank, seed), row) in zip(found, rows.items(), strict=True):
        assert (vae.name, vae.latents) == (f"{arm}, r = {rank}, seed {seed}", row["open"])
        x, x_hat, *_ = verdicts.outputs(vae, np.asarray(vae.rows))
        assert np.square(x - x_hat).sum(1).mean() == pytest.approx(row["error_mean"], rel=1e-4)


def test_every_run_has_a_whole_row_and_history(finished):
    path, rows = finished
    assert set(rows) == {(a, r, s) for a in ARMS for r in RANKS for s in SEEDS}
    for (arm, rank, seed), row in rows.items():
        numbers = [value for value in row.values() if isinstance(value, float)]
        assert np.isfinite(numbers).all()
        length = 2 if arm.startswith("plain") else 1
        assert (row["steps"], row["kappa"], row["test_images"]) == (length * STEPS, 4, 32)
        assert len(row["kl_per_dimension"]) == len(row["variance_per_dimension"]) == 4
        assert row["kl"] == pytest.approx(sum(row["kl_per_dimension"]), rel=1e-5)
        assert len(row["factor_r2"]) == rank
        assert row["nll"] < row["negative_elbo"]
        assert 1 <= row["effective_sample_size"] <= 64
        # Both sets are drawn from one distribution, and eight steps learn nothing by heart.
        assert 0.5 < row["error_train"] / row["error_mean"] < 2
        assert row["error_train"] != row["error_mean"]
        off = row["gamma"] - row["error_sampled"] / 192  # on test images, as on those of training
        assert row["gamma_residual_test"] == pytest.approx(off, rel=1e-3)
        folder = path / "runs" / gamma.Run(arm, rank, seed).name
        history = list(map(json.loads, (folder / "history.jsonl").read_text().splitlines()))
        assert [entry["epoch"] for entry in history] == [1, 2, 3, 4][: 2 * length]
        assert history[-1]["gamma"] == pytest.approx(row["gamma"], rel=1e-6)
        with np.load(folder / "arrays.npz") as pictures:
            for name in ("images", "reconstructions", "samples"):
                assert pictures[name].shape == (4, 192)
            assert pictures["traversals"].shape[1:] == (9, 192)
    assert all((path / name).exists() for name in ("table.md", "speed.png", "dimensions.png"))


@pytest.mark.slow
def test_a_tighter_bound_is_set_beside_the_nll(tmp_path):
    """On the first images; and the page tells of it."""
    alone = {"train__arms": ("learned 1e-1",), "data__ranks": (2,), "train__seeds": (0,)}
    (row,) = gamma.run(tiny(**alone, eval__laplace_images=8), str(tmp_path))
    assert 0 < row["laplace_gain"] < row["negative_elbo"] - row["nll"] + 20
    assert "samples from the Laplace approximation" in (tmp_path / "table.md").read_text()


def test_a_fixed_gamma_is_its_own_seeds_final_gamma(finished):
    _, rows = finished
    values = set()
    for rank in RANKS:
        for seed in SEEDS:
            fixed, adaptive = rows["fixed at adaptive", rank, seed], rows["adaptive", rank, seed]
            for end in ("gamma_start", "gamma"):
                assert fixed[end] == pytest.approx(adaptive["gamma"], rel=1e-6)
            assert adaptive["gamma"] < adaptive["gamma_start"]
            values.add(round(math.log(adaptive["gamma"]), 5))
    assert len(values) == 4  # so another's would have been seen


def test_gamma_moves_at_the_speed_of_its_arm(finished):
    """By exactly so much as 8 steps allow, or, where they are enough, to the target itself."""
    _, rows = finished
    for rank in RANKS:
        for seed in SEEDS:
            of = lambda arm: rows[arm, rank, seed]  # noqa: B023, E731
            start = of("learned 1e-2")["gamma_start"]
            assert of("learned 1e-2")["gamma"] == pytest.approx(
                start * math.exp(-STEPS * 1e-2), rel=1e-5
            )
            assert of("adam 1e-2")["gamma"] == pytest.approx(
                start * math.exp(-STEPS * 1e-2), rel=1e-2
            )
            end = of("adaptive")["gamma"]
            assert math.log(start / end) < STEPS * 0.5 - 0.1  # at its guard, not still falling
            assert of("annealed 1.0 to adaptive")["gamma"] == pytest.approx(end, rel=1e-5)


def test_learned_and_fixed_start_as_the_same_network(finished):
    path, _ = finished
    config, cells = tiny(), Cells(path)
    data, found = gamma.Data(config), {arm.name: arm for arm in gamma_arms.arms(config)}
    programs = gamma.Programs(config, cells, data, {})
    run = gamma.Run("adaptive", 2, 1)
    objective = gaussian_vae(gamma.build_model(config, data.of(run).image_shape))
    settings = Optimisation(1e-3, 1e-4, 2, STEPS, 20.0)
    states = []
    for name in ("adaptive", "fixed at adaptive"):
        rule = gamma_arms.rule(found[name].kind, config, 192, STEPS)
        member = programs.member(run._replace(arm=name))
        start = jax.jit(functools.partial(init_state, objective, settings, rule))
        states.append(start(member, jnp.full(192, 0.5)))
    gammas = [float(state.homotopy.log_gamma) for state in states]
    assert gammas[0] > gammas[1] + 0.01
    jax.tree.map(np.testing.assert_array_equal, states[0].weights, states[1].weights)


@pytest.mark.slow
def test_a_settled_run_goes_on_where_its_arm_ended(finished, monkeypatch):
    """With its weights, latents and gamma, which it then lets go to its closed form."""
    path, rows = finished
    config, row_of = tiny(), Cells.row
    monkeypatch.setattr(Cells, "row", lambda cells, run: row_of(cells, run) | {"open": 3})
    images = gamma.inputs.open_data(config, 2, 1)
    cells, data = Cells(path), gamma.Data(config, {(2, 1): images})
    groups = gamma.groups_of(config, gamma_arms.arms(config), RANKS, together="all")
    programs = gamma.Programs(config, cells, data, groups)
    run = gamma.Run("settled after adaptive", 2, 1)
    start = jax.device_get(programs.of([run, run._replace(seed=0)]).init())
    name, before = next((n, g) for n, g in groups.items() if run._replace(arm="adaptive") in g)
    with Checkpoints(path / "checkpoints" / name) as checkpoints:
        shapes = state_shapes(*programs._recipe(before))
        end = jax.device_get(checkpoints.restore(2, shapes))
    index = before.index(run._replace(arm="adaptive"))
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a[0], b[index]), start.weights, end.weights
    )
    assert start.homotopy.open[0] == 3
    assert np.exp(start.homotopy.log_gamma[0]) == pytest.approx(rows["adaptive", 2, 1]["gamma"])
    of = lambda arm: rows[arm, 2, 1]  # noqa: E731
    assert of(run.arm)["gamma"] < of("adaptive")["gamma"]
    assert of(run.arm)["error_sampled"] < of("adaptive")["error_sampled"]


def test_a_plain_run_has_the_latents_that_its_arm_counted_and_begins_anew():
    config, arm = tiny(), gamma_arms.parse("plain 1e-2 after adaptive", 0.5)
    plain = gamma_arms.member(config, arm, 1, 2.0, {"gamma": 0.5, "open": 3})
    assert (plain.seed, plain.latents, plain.gamma, plain.rule) == (1, 3, 2.0, {"rate": 1e-2})
    stopped = gamma_arms.member(config, arm, 1, 2.0, {"stopped": 7})
    assert np.isnan(stopped.gamma)


@pytest.mark.parametrize(
    ("changes", "ranks", "expected"),
    [
        ({}, 2, "all"),
        ({}, 1, "all"),
        ({"train__device_bytes": 64 * 192 * 4 * 14}, 2, "rank"),  # the 14 runs of one r
        ({"train__device_bytes": 64 * 192 * 4 * 14 - 1}, 2, "none"),
        ({"model__width": 512}, 2, "none"),  # its products fill the cores
        ({"data__name": "rendered"}, 2, "all"),
        ({"data__name": "digits"}, 1, "all"),
    ],
)
def test_runs_train_together_where_they_fit_and_gain_by_it(changes, ranks, expected):
    config = tiny(**changes)
    images = gamma.inputs.open_data(config, 1, 0)
    assert gamma._together(config, images, ranks) == expected
    groups = gamma.groups_of(config, gamma_arms.arms(config), RANKS[:ranks], expected)
    runs = [run for group in groups.values() for run in group]
    assert len(set(runs)) == len(runs) == ranks * len(ARMS) * len(config.train.seeds)
    kinds = len({arm.split()[0] for arm in ARMS})
    assert len(groups) == {"all": kinds, "rank": ranks * kinds, "none": len(runs)}[expected]


@pytest.mark.parametrize(
    ("name", "seeds", "expected"),
    [("rendered", SEEDS, "rank"), ("network", SEEDS, "none"), ("network", (0,), "rank")],
)
def test_pixels_drawn_in_every_batch_are_drawn_by_one_function(monkeypatch, name, seeds, expected):
    """From r factors: runs of two r cannot be stacked, nor those of two random networks."""
    monkeypatch.setattr("vaebal.data.sets.STORED_BYTES", 0)
    config = tiny(data__name=name, train__seeds=seeds)
    images = gamma.inputs.open_data(config, 1, 0)
    assert gamma._together(config, images, 2) == expected


def test_every_training_seed_has_data_of_its_own(finished):
    """The same for all arms of a seed; not where the data are not drawn here."""
    _, rows = finished
    config = tiny(data__seed=3)
    of = lambda rank, seed, arm="adaptive": gamma.data_seed(config, gamma.Run(arm, rank, seed))  # noqa: E731
    assert [of(2, seed) for seed in (0, 1, 5)] == [3, 4, 8]
    assert of(2, 1, "learned 1e-2") == of(2, 1)
    assert [of(0, seed) for seed in (0, 5)] == [0, 0]
    for (_, _, seed), row in rows.items():
        assert row["data_seed"] == seed
    starts = {rows["learned 1e-2", rank, seed]["gamma_start"] for rank in RANKS for seed in SEEDS}
    assert len(starts) == 4
    data = gamma.Data(config)
    first, second = (data.of(gamma.Run("adaptive", 2, seed)).train for seed in SEEDS)
    assert np.abs(first - second).max() > 0.1
    again = manifold("linear", rank=2, resolution=8, train_size=64, test_size=32, seed=4).train
    np.testing.assert_array_equal(second, again)


@pytest.mark.slow
def test_latents_never_opened_are_evaluated_as_the_priors(tmp_path, monkeypatch):
    """Training masks them; the evaluated model has them on Theorem 2's stationary set."""
    monkeypatch.setattr(gamma_report, "write", lambda *args: None)
    changes = {"data__ranks": (2,), "train__seeds": (1,), "train__arms": ("adaptive",)}
    (row,) = gamma.run(tiny(**changes, train__patience=1000), str(tmp_path / "run"))
    history = json.loads((tmp_path / "run/runs/adaptive_r2_seed1/history.jsonl").read_text()[:-1]
                         .splitlines()[-1])  # fmt: skip
    assert row["open"] == history["open"] == 1
    assert row["kl_per_dimension"][0] > 0
    assert row["kl_per_dimension"][1:] == [0.0] * 3
    assert row["variance_per_dimension"][1:] == [1.0] * 3
    assert row["informative"] <= 1
    (whole,) = gamma.run(tiny(**changes), str(tmp_path / "whole"))
    assert whole["open"] == 4
    assert min(whole["kl_per_dimension"]) > 0


@pytest.mark.slow
def test_the_adaptive_homotopy_ends_with_as_many_active_latents_as_dimensions(tmp_path):
    """On a curved manifold of r = 2, of ten latents; gamma learned fast wakes more of them."""
    config = network_gamma.get_config()
    changes = {
        "data.ranks": (2,), "data.train_size": 8000, "data.test_size": 1000, "model.latents": 10,
        "model.width": 64, "train.seeds": (0,), "train.arms": ("adaptive", "learned 1e-1"),
        "train.epochs": 45, "train.patience": 300, "train.epochs_per_chunk": 45,
    }  # fmt: skip
    config.update_from_flattened_dict(changes)
    adaptive, fast = gamma.run(config, str(tmp_path))
    assert (adaptive["open"], adaptive["active_0.01"], adaptive["informative"]) == (2, 2, 2)
    assert min(adaptive["factor_r2"]) > 0.9
    # Stationary, once released.
    assert abs(adaptive["gamma_residual_relative"]) < 0.1
    assert adaptive["gamma"] < 1e-2 * adaptive["gamma_start"]
    assert fast["active_0.01"] > 2


def test_the_same_command_again_trains_nothing(finished, monkeypatch):
    path, rows = finished

    def refuse(*args, **options):
        raise AssertionError("trained again")

    monkeypatch.setattr(gamma.Programs, "of", refuse)
    monkeypatch.setattr(gamma_report, "write", lambda *args: None)
    again = gamma.run(tiny(), str(path))
    assert again == list(rows.values())


@pytest.mark.slow
def test_a_seed_among_others_is_the_seed_alone(finished, tmp_path, monkeypatch):
    _, rows = finished
    monkeypatch.setattr(gamma_report, "write", lambda *args: None)
    changes = {"data__ranks": (2,), "train__seeds": (1,), "train__arms": ("adaptive",)}
    (alone,) = gamma.run(tiny(**changes), str(tmp_path))
    among = rows["adaptive", 2, 1]
    for name in ("gamma", "error_mean", "error_sampled", "negative_elbo", "kl"):
        assert alone[name] == pytest.approx(among[name], rel=1e-4), name
        other = rows["adaptive", 2, 0][name]
        assert other != pytest.approx(among[name], rel=1e-4), name  # so it could fail


@pytest.mark.slow
def test_a_run_that_stops_takes_with_it_those_that_need_its_gamma_and_no_other(
    finished, tmp_path, monkeypatch
):
    _, whole = finished
    arms = ("adaptive", "fixed at adaptive", "settled after adaptive", "learned 1e-2")
    member = gamma.Programs.member

    def spoiled(programs, run):
        lost = (run.arm, run.seed) == ("adaptive", 1)
        return member(programs, run)._replace(**{"gamma": math.nan} if lost else {})

    monkeypatch.setattr(gamma.Programs, "member", spoiled)
    config = tiny(data__ranks=(2,), train__arms=arms)
    with pytest.raises(Diverged) as error:
        gamma.run(config, str(tmp_path))
    said = str(error.value)
    assert said in (tmp_path / "table.md").read_text().splitlines()
    stopped = [arm for arm in arms if "adaptive" in arm]
    for arm in stopped:
        folder = tmp_path / "runs" / (name := gamma.Run(arm, 2, 1).name)
        row = {"arm": arm, "rank": 2, "seed": 1, "stopped": 0}
        assert json.loads((folder / "row.json").read_text()) == row
        assert f"{name} (step 0)" in said
        assert not (folder / "history.jsonl").exists()
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert len(rows) == 2 * len(arms) - len(stopped)
    for row in rows:
        expected = whole[row["arm"], 2, row["seed"]]
        for name in ("gamma", "error_mean", "negative_elbo"):
            assert row[name] == pytest.approx(expected[name], rel=1e-4), name

    monkeypatch.setattr(gamma.Programs, "of", None)
    with pytest.raises(Diverged) as error:
        gamma.run(config, str(tmp_path))
    assert str(error.value) == said


@pytest.mark.slow
def test_rows_too_large_for_the_device_are_streamed_into_the_same_run(
    finished, tmp_path, monkeypatch
):
    _, rows = finished
    monkeypatch.setattr(gamma_report, "write", lambda *args: None)
    monkeypatch.setattr(gamma, "Program", None)
    monkeypatch.setattr(gamma, "mean_image", None)  # which takes them all to the device
    passes, real = [], gamma.host_mean_image
    monkeypatch.setattr(gamma, "host_mean_image", lambda *a: passes.append(1) or real(*a))
    changes = {"data__ranks": (2,), "train__device_bytes": 49151}
    changes |= {"train__arms": ("adaptive", "learned 1e-2")}
    for streamed in gamma.run(tiny(**changes), str(tmp_path)):  # 64 rows of 192 floats
        stored = rows[streamed["arm"], 2, streamed["seed"]]
        for name in ("gamma", "error_mean", "negative_elbo", "kl"):
            assert streamed[name] == pytest.approx(stored[name], rel=1e-4), name
    assert len(passes) == len(SEEDS)  # whatever the arms


@pytest.fixture(scope="module")
def flat():
    """A linear manifold of rank 3, variances in the ratios 1, .32, .1."""
    return manifold("linear", rank=3, resolution=8, train_size=200, test_size=64)


def largest_eigenvalue(rows):
    return np.linalg.eigvalsh(np.cov(np.float64(rows).T, ddof=0))[-1]


def test_gamma_starts_at_the_largest_variance(flat):
    expected = largest_eigenvalue(flat.train)
    assert gamma_evaluate.largest_variance(flat) == pytest.approx(expected, rel=1e-4)
    drawn = some_indices(len(flat.train), 50, "largest variance")
    assert gamma_evaluate.largest_variance(flat, rows=50) == pytest.approx(
        largest_eigenvalue(flat.train[drawn]), rel=1e-4
    )
    # Of a sorted set the first rows would tell a part of the variance only.
    top = np.linalg.eigh(np.cov(flat.train.T))[1][:, -1]
    ordered = dataclasses.replace(flat, train=flat.train[np.argsort(flat.train @ top)])
    got = gamma_evaluate.largest_variance(ordered, rows=100)
    assert got == pytest.approx(expected, rel=0.2)
    assert largest_eigenvalue(ordered.train[:100]) < 0.8 * expected


def test_the_residuals_largest_variance(flat):
    """Along the direction that one half of the images has most of, over the other; both ways."""
    model = gamma.build_model(tiny(), flat.image_shape)
    params = jax.jit(lambda: init_params(model, stream(0, "init"), jnp.asarray(flat.train[0])))()
    mean, _ = model.apply({"params": params}, flat.test, method="encode")
    residual = flat.test - model.apply({"params": params}, mean, method="decode")
    residual = np.asarray(residual)
    residual = residual - residual.mean(0)
    halves, expected = (residual[::2], residual[1::2]), []
    for found, measured in (halves, halves[::-1]):
        direction = np.linalg.svd(found, full_matrices=False)[2][0]
        expected.append(np.square(measured @ direction).mean())
    for block in (40, 100):  # that divides the images, and that does not
        got = gamma_evaluate.residual_variance(model, params, flat, block)
        assert got == pytest.approx(np.mean(expected), rel=1e-3)


def test_factors_are_recovered_from_latents_that_hold_them_and_from_no_others():
    rng = np.random.default_rng(0)
    factors, noise = rng.uniform(size=(4000, 2)), rng.normal(size=(4000, 3))
    turned = np.sqrt(factors) @ rng.normal(size=(2, 2))

    def r2(z):
        return np.array(factor_r2(z[:3000], factors[:3000], z[3000:], factors[3000:]))

    assert (r2(factors) > 0.99).all()
    assert (r2(turned) > 0.98).all()
    # A mean over 10 unrelated neighbours adds a tenth of the variance to the error.
    np.testing.assert_allclose(r2(noise), -0.1, atol=0.1)
    first = r2(np.c_[factors[:, 0], noise[:, 0] * 0.01])
    assert first[0] > 0.9
    assert abs(first[1] + 0.1) < 0.1
    # Inverse distances on a line give the nearest most of the weight.
    np.testing.assert_allclose(r2(noise[:, :1]), -0.25, atol=0.1)
    assert (r2(noise[:, :0]) == 0).all()
    assert factor_r2(noise[:100], np.full((100, 1), 0.1), noise[:50], np.full((50, 1), 0.1)) == [0]


def test_the_share_of_a_latent_that_one_factor_explains():
    """Sobol's first-order indices of known functions; 0 for interactions and noise."""
    rng = np.random.default_rng(0)
    a, b = factors = rng.uniform(size=(2, 200_000))
    z = np.c_[a, (a - 0.5) ** 2, a + 2 * b, (a - 0.5) * (b - 0.5), rng.normal(size=a.size)]
    z = np.c_[z, np.full(a.size, 0.1)]  # of which rounding leaves a variance
    expected = [[1, 0], [1, 0], [0.2, 0.8], [0, 0], [0, 0], [0, 0]]
    # Ten bins leave a hundredth of a factor's own variance within them, and 1/25 of its square's.
    np.testing.assert_allclose(factor_shares(z, factors.T), expected, atol=0.05)
    few = [factor_shares(rng.normal(size=(60, 1)), rng.uniform(size=(60, 1)))[0, 0]
           for _ in range(400)]  # fmt: skip
    assert abs(np.mean(few)) < 4 * np.std(few) / 20
    some = factor_shares(factors.T[:15], factors.T[:15])  # bins of two
    assert np.isfinite(some).all()
    with pytest.raises(ValueError, match="z has 3 examples; give at least 4"):
        factor_shares(factors.T[:3], factors.T[:3])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("adaptive", ("adaptive", 0.02, "")),
        ("guarded", ("guarded", 0.02, "")),
        ("learned 1e-3", ("learned", 1e-3, "")),
        ("adam .5", ("adam", 0.5, "")),
        ("held .2", ("held", 0.2, "")),
        ("annealed 2e-3 to learned 1e-3", ("annealed", 2e-3, "learned 1e-3")),
        ("settled after adaptive", ("settled", 0.02, "adaptive")),
        ("plain 5e-3 after adaptive", ("plain", 5e-3, "adaptive")),
        ("fixed at annealed 2e-3 to adaptive", ("fixed", 0.0, "annealed 2e-3 to adaptive")),
    ],
)
def test_arms_are_read(text, expected):
    arm = gamma_arms.parse(text, 0.02)
    assert (arm.name, (arm.kind, arm.number, arm.of)) == (text, expected)


@pytest.mark.parametrize(
    "text",
    [
        *("", "adaptiv", "adaptive 1e-3", "learned", "learned fast", "learned 0", "learned -1e-3"),
        *("learned inf", "learned nan", "learned 1e-3 1e-2", "adam", "annealed 1e-3", "fixed"),
        *("annealed 1e-3 to", "annealed to adaptive", "fixed at", "fixed adaptive", "Adaptive"),
        *("settled", "settled after", "settled at adaptive", "plain 1e-2 after", "plain after x"),
    ],
)
def test_arms_that_none_spells_are_told(text):
    with pytest.raises(InputError, match=r"^train\.arms holds .*'learned RATE'") as error:
        gamma_arms.parse(text, 0.02)
    assert repr(text) in str(error.value)


@pytest.mark.parametrize(
    ("arms", "message"),
    [
        (("fixed at adaptive", "adaptive"), "'adaptive' is not run before it"),
        (("adaptive", "fixed at learned 1e-3"), "'learned 1e-3' is not run before it"),
        (("annealed 1e-3 to adaptive",), "'adaptive' is not run before it"),
        (("adaptive", "fixed at adaptive", "fixed at fixed at adaptive"), "did not find its γ"),
        (("held .1", "annealed 1.0 to held .1"), "did not find its γ itself"),
        (("settled after adaptive", "adaptive"), "'adaptive' is not run before it"),
        (("adaptive", "adaptive"), "none twice"),
        ((), "at least one"),
    ],
)
def test_arms_in_an_impossible_order_are_told(arms, message):
    with pytest.raises(InputError, match=rf"^train\.arms.*{message}"):
        gamma_arms.arms(tiny(train__arms=arms))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("data.ranks", (0,)), ("data.ranks", (13,)), ("data.ranks", (2, 2)), ("data.ranks", ()),
        ("data.train_size", 0), ("data.resolution", 0), ("data.noise", -0.1),
        ("data.noise", math.nan), ("model.network", "resnet"), ("model.activation", "sin"),
        ("model.products", "half"), ("model.remat", True), ("train.guard_memory", 0),
        ("model.pool", 0),
        ("model.latents", 0), ("model.gamma", -1.0), ("model.blocks", 0), ("train.seeds", (-1,)),
        ("train.seeds", (2**31,)), ("train.seeds", (0, 0)), ("train.epochs", 0),
        ("train.batch_size", 0), ("train.learning_rate", 0.0), ("train.fastest", 0.0),
        ("train.beta2", 1.0), ("train.beta2", 0.0), ("train.jitter", -0.1),
        ("train.guard", math.inf), ("train.patience", -1), ("train.slowest", -1e-4),
        ("train.release", (0.8, 0.6)),
        ("train.release", (0.5, 1.5)), ("train.release", (0.5,)), ("train.device_bytes", 0),
        ("eval.block", 0), ("eval.mmd_samples", 3), ("eval.train_images", 0),
    ],
)  # fmt: skip
def test_fields_that_cannot_be_meant_are_named(field, value):
    """In one sentence, before any work."""
    with pytest.raises(InputError) as error:
        gamma.check(tiny(**{field.replace(".", "__"): value}))
    assert str(error.value).startswith(f"{field}=")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("field", "value", "changes"),
    [
        ("train.batch_size", 65, {}),
        ("model.patch", 3, {"model__network": "conv"}),
        ("model.pool", 3, {"model__network": "mlp"}),
        ("model.network", "'infogan'", {"model__network": "infogan", "data__resolution": 10}),
    ],
)
def test_fields_that_do_not_fit_the_data_are_named(field, value, changes):
    config = tiny(**({field.replace(".", "__"): value} | changes))
    side = config.data.resolution
    images = manifold("linear", rank=1, resolution=side, train_size=64, test_size=1)
    with pytest.raises(InputError, match=rf"^{field}={value}[: ]"):
        gamma.check_against_data(config, images)


@pytest.mark.parametrize(
    ("network", "field", "value"),
    [
        ("conv", "pool", 2), ("conv", "encoder_skip", True), ("mlp", "patch", 8),
        ("mlp", "remat", True), ("infogan", "width", 16), ("infogan", "blocks", 2),
        ("infogan", "residual", False), ("infogan", "patch", 8),
    ],
)  # fmt: skip
def test_a_field_that_the_network_does_not_know_is_named(network, field, value):
    changes = {"model__width": 64, "model__network": network, f"model__{field}": value}
    with pytest.raises(InputError, match=rf"^model.{field}={value} does nothing for .*{network}'"):
        gamma.check(tiny(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"data__name": "mnist", "data__noise": 0.1},
            r"^data\.noise=0\.1 does nothing for .*'mnist'",
        ),
        (
            {"eval__nll_samples": 0, "eval__laplace_images": 8},
            r"^eval\.laplace_images=8 does nothing where eval\.nll_samples=0",
        ),
    ],
)
def test_a_field_that_another_leaves_nothing_to_do_is_named(changes, message):
    with pytest.raises(InputError, match=message):
        gamma.check(tiny(**changes))


def test_what_groups_the_runs_may_not_change_in_a_workdir():
    assert "train.device_bytes" not in fields.FREE


def test_a_refused_run_leaves_no_workdir(tmp_path):
    with pytest.raises(InputError):
        gamma.run(tiny(train__batch_size=1000), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "module", [celeba64_gamma, celeba128_gamma, folder_gamma, rendered64_gamma]
)
@pytest.mark.parametrize("variant", ["", "quick"])
def test_the_configs_can_be_meant(module, variant):
    """And their network fits their images, down to grids of side 4."""
    config = module.get_config(variant)
    gamma.check(config)
    side = config.data.resolution
    model = gamma.build_model(config, (side, side, 3))
    assert f"{side}_gamma" in config.name or config.data.name == "folder"
    assert config.name.endswith(variant or "gamma")
    z = jax.eval_shape(lambda: prior_samples(jax.random.key(0), 2, model.latents))
    params = jax.eval_shape(lambda: init_params(model, jax.random.key(0), jnp.zeros(3 * side**2)))
    x_hat = jax.eval_shape(lambda p, z: model.apply({"params": p}, z, method="decode"), params, z)
    assert x_hat.shape == (2, 3 * side**2)
    with pytest.raises(ValueError, match="has no variant 'fast'"):
        module.get_config("fast")


def test_the_run_over_seeds_is_the_quick_one_over_more_r_and_seeds():
    quick, seeds = map(rendered64_gamma.get_config, ("quick", "seeds"))
    gamma.check(seeds)
    assert len(seeds.data.ranks) * len(seeds.train.seeds) == 20
    for config in (quick, seeds):
        config.data.ranks, config.train.seeds = (4,), (0,)
        config.train.arms, config.name = ("adaptive",), "same"
    assert quick.to_dict() == seeds.to_dict()


@pytest.mark.parametrize("module", [celeba64_gamma, celeba128_gamma])
def test_celeba_that_is_not_there_is_told_before_any_work(module, tmp_path):
    config = module.get_config()
    config.data.dir = str(tmp_path)
    with pytest.raises(InputError, match=r"data\.name='celeb_a' was not found in data\.dir="):
        gamma.run(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "gamma", "latents", "rule"),
    [
        ("held .2", 0.2, 4, {}),
        ("plain 1e-2 of 3", 2.0, 3, {"rate": 1e-2}),
        ("adaptive 500", 2.0, 4, {"rate": 0.5, "guard": tiny().train.guard, "patience": 500.0}),
    ],
)
def test_a_member_has_what_its_arm_says(text, gamma, latents, rule):
    got = gamma_arms.member(tiny(), gamma_arms.parse(text, 0.5), 1, 2.0, {})
    assert (got.gamma, got.latents, got.rule) == (gamma, latents, rule)


ON_TWO_CORES = """
import sys
import test_gamma
from vaebal.experiments.gamma import run
from vaebal.training import devices

assert devices.are_cores()
run.run(test_gamma.tiny(), sys.argv[1])
"""


@pytest.mark.slow
def test_on_two_cores_the_rows_are_the_same(finished, tmp_path):
    """As `vaebal run` has it on a CPU: stacks are spread, and members evaluated, over the cores."""
    tests = Path(__file__).parent
    path = os.pathsep.join(filter(None, [str(tests), os.environ.get("PYTHONPATH")]))
    subprocess.run(
        [sys.executable, "-c", ON_TWO_CORES, str(tmp_path)], check=True, cwd=tests.parent,
        env=os.environ | {"PYTHONPATH": path, "JAX_NUM_CPU_DEVICES": "2"},
    )  # fmt: skip
    rows = {
        (r["arm"], r["rank"], r["seed"]): r
        for r in json.loads((tmp_path / "rows.json").read_text())
    }
    assert rows.keys() == finished[1].keys()
    for of, row in finished[1].items():
        for name in ("open", "error_mean", "negative_elbo", "mmd", "active_0.01", "nll"):
            assert rows[of][name] == pytest.approx(row[name], rel=1e-3, abs=1e-4), (of, name)
