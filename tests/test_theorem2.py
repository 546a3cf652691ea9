"""The experiment on Theorem 2, as a user runs it, and the claims of its rows."""

import json
import math

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from scipy import stats

from configs import theorem2 as config_file
from vaebal.errors import InputError
from vaebal.experiments.theorem2 import escape, problems, stationary
from vaebal.experiments.theorem2 import page as theorem2_report
from vaebal.experiments.theorem2 import run as theorem2
from vaebal.models import init_params
from vaebal.streams import stream
from vaebal.theory import collapse


def tiny(**changes) -> ConfigDict:
    """The experiment made so small that it takes seconds."""
    config = config_file.get_config()
    fields = {
        "data.dim": 6,
        "data.examples": 24,
        "data.variances": (4.0, 1.0),
        "model.skips": ("residual+affine", "none"),
        "model.blocks": (1,),
        "model.kappas": (2,),
        "model.width": 8,
        "model.encoder_layers": 2,
        "certificate.activations": ("tanh",),
        "certificate.depths": (2,),
        "certificate.widths": (5,),
        "curvature.gammas": (0.3, 5.0),
        "train.seeds": (0, 1, 2),
        "train.steps": 150,
        "train.gammas": (6.0, 0.5),
        "descent.kappa": 2,
        "descent.gammas": (6.0, 0.5),
        "descent.steps": 400,
    }
    config.update_from_flattened_dict(fields | changes)
    return config


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One small run, made once for the tests below."""
    path = tmp_path_factory.mktemp("theorem2") / "run"
    return path, theorem2.run(tiny(), str(path))


def initialised(model, x):
    return jax.jit(lambda: init_params(model, stream(0, "init"), x.mean(0)))()


def select(rows, **fields):
    """The rows with these fields; a loop over none of them would assert nothing."""
    found = [row for row in rows if all(row.get(name) == v for name, v in fields.items())]
    assert found, fields
    return found


@pytest.mark.slow
def test_certificates_vanish_where_the_theorem_says_so(finished):
    _, rows = finished
    weights = list(theorem2_report.WEIGHTS)
    decoder, encoder = weights[:2], weights[2:]
    assert [row["biases"] for row in select(rows, part="certificates")] == [
        *("absent", "zero", "live")
    ]
    for row in select(rows, part="certificates"):
        pair = [row[f"antithetic {weight}"] for weight in weights]
        if row["biases"] == "live":
            assert min(pair) > 1e-4
        else:
            assert max(pair) < 1e-13
            assert min(row[f"one draw {weight}"] for weight in decoder) > 1e-2
            assert max(row[f"one draw {weight}"] for weight in encoder) < 1e-13


@pytest.mark.slow
def test_the_predicted_curvature_is_the_measured_one(finished):
    _, rows = finished
    for row in select(rows, part="curvature"):
        assert row["measured"] == pytest.approx(row["predicted"], rel=1e-7, abs=1e-10)
        assert (row["explained_over_gamma"] > 1) == (row["measured"] < -1e-9)
        assert (row["explained_over_gamma"] > 1) == (row["gamma"] < 4)
    steep, shallow = (
        select(rows, part="curvature", skips=skips, gamma=0.3)[0]["measured"]
        for skips in ("residual+affine", "none")
    )
    assert steep < shallow < 0


@pytest.mark.slow
def test_no_run_leaves_above_the_largest_variance_and_all_do_well_below(finished):
    _, rows = finished
    for row in select(rows, part="training", gamma_start=6.0):
        assert row["held_gamma"] == pytest.approx(6.0, rel=1e-6)
        assert row["held_awake"] == row["held_informative"] == 0
        assert not row["held_recovered"]
        assert abs(row["held_share"]) < 0.05
    for row in select(rows, part="training", gamma_start=0.5, skips="residual+affine"):
        assert row["held_shares"][0] > 0.8
        assert row["held_informative"] > 0
    # Released, gamma falls to its stationary value and below.
    assert all(row["learned_gamma"] < 6.0 for row in select(rows, part="training"))


@pytest.mark.slow
def test_descent_escapes_when_the_linear_theory_says(finished):
    """Steps within a factor of two, over curvatures that differ by more."""
    _, rows = finished
    for row in select(rows, part="descent", gamma=6.0):
        assert row["escape_step"] == -1
        assert row["predicted_steps"] is None or row["predicted_steps"] > 1e4
    escaped = [row for row in select(rows, part="descent", gamma=0.5) if row["escape_step"] > 0]
    assert len(escaped) >= 3
    for row in escaped:
        assert 0.4 < row["escape_step"] / row["predicted_steps"] < 1.5
    for row in select(rows, part="descent", gamma=0.5):
        assert (row["escape_step"] > 0) or row["predicted_steps"] > 400


def test_the_data_have_the_stated_covariance():
    with jax.enable_x64(True):
        x, directions = (np.asarray(a) for a in problems.make_problem(3, 20, 6, (4.0, 1.0)))
    np.testing.assert_allclose(x.mean(0), 0, atol=1e-12)
    expected = (directions * np.array([[4.0, 1.0]])) @ directions.T
    np.testing.assert_allclose(x.T @ x / 20, expected, atol=1e-12)


def test_features_are_what_the_mean_head_reads():
    """Heads are linear: features times [kernel; bias] is the mean."""
    with jax.enable_x64(True):
        model = problems.make_model(tiny(), "none", 1, 2)
        x = problems.make_problem(0, 20, 6, (4.0, 1.0)).x + 1.0
        params = initialised(model, x)
        params["encoder"]["mean"]["bias"] += 0.3
        read = jax.jit(lambda params: stationary.features(model, params, x))(params)
        head = params["encoder"]["mean"]
        mean = read @ jnp.concatenate([head["kernel"], head["bias"][None, :]])
        expected, _ = model.apply({"params": params}, x, method="encode")
        np.testing.assert_allclose(mean, expected, rtol=1e-10)


def test_the_exact_loss_has_the_hessian_of_the_expectation():
    """Against the mean over many draws, within its standard error."""
    with jax.enable_x64(True):
        model = problems.make_model(tiny(), "residual", 1, 2)
        x = problems.make_problem(0, 24, 6, (4.0, 1.0)).x
        params = initialised(model, x)
        params = problems.total_collapse(model, params, x, jnp.log(0.5))
        direction = problems.perturb(params, stream(1, "test"), 1.0)
        direction = jax.tree.map(jnp.subtract, direction, params)

        def curvature(loss):
            along = lambda t: loss(jax.tree.map(lambda p, d: p + t * d, params, direction))  # noqa: E731
            h = 1e-4
            return (along(h) - 2 * along(0.0) + along(-h)) / h**2

        def drawn(key):
            eps = jax.random.normal(key, (24, 2))
            return curvature(lambda p: collapse.antithetic_loss(model, p, x, eps))

        samples = jax.jit(jax.vmap(drawn))(jax.random.split(stream(0, "test"), 600))
        exact = jax.jit(lambda: curvature(lambda p: stationary.exact_loss(model, p, x)))()
        error = float(samples.std()) / math.sqrt(600)
        assert abs(float(exact) - float(samples.mean())) < 4 * error
        assert error < 0.05 * abs(float(exact))


def test_total_collapse_is_stationary_in_every_weight():
    with jax.enable_x64(True):
        model = problems.make_model(tiny(**{"model.activation": "softplus"}), "none", 1, 2)
        x = problems.make_problem(0, 24, 6, (4.0, 1.0)).x + 1.0
        params = initialised(model, x)
        params = problems.total_collapse(model, params, x, jnp.log(0.5))
        gradient = jax.jit(jax.grad(lambda p: stationary.exact_loss(model, p, x)))(params)
        flat, _ = jax.flatten_util.ravel_pytree(gradient | {"log_gamma": jnp.zeros(())})
        assert float(jnp.abs(flat).max()) < 1e-12


def test_a_perturbation_moves_what_collapse_zeroed_and_nothing_else():
    model = problems.make_model(tiny(), "residual+affine", 1, 2)
    params = initialised(model, jnp.zeros((1, 6)))

    @jax.jit
    def moves(params):
        params = problems.total_collapse(model, params, jnp.zeros((1, 6)), jnp.log(0.5))
        moved = problems.perturb(params, stream(0, "test"), 1e-3)
        return params, moved, collapse.collapse(moved)

    params, moved, back = moves(params)
    for was, now in zip(jax.tree.leaves(params), jax.tree.leaves(back), strict=True):
        np.testing.assert_array_equal(was, now)
    kernel = np.asarray(moved["affine"]["kernel"])
    assert np.abs(kernel).min() > 0
    assert 0.3e-3 < kernel.std() < 3e-3


def test_awake_is_half_of_what_pca_restores():
    variances, gamma = np.array([4.0, 1.0]), np.array([2.0, 2.0, 0.5])
    shares = np.array([[0.38, 0.49], [0.37, 0.51], [0.5, 0.38]])  # pPCA's: 3/4, then 63/64, 3/4
    np.testing.assert_array_equal(
        escape.awake(shares, variances, gamma), [[True, False], [False, True], [True, True]]
    )


@pytest.mark.slow
def test_the_tables_intervals_are_scipys(finished):
    _, rows = finished
    runs = select(rows, part="training", gamma_start=0.5, skips="none")
    fraction, low, high = theorem2_report.recovered(runs, "held")
    count = sum(row["held_recovered"] for row in runs)
    expected = stats.binomtest(count, 3).proportion_ci(method="wilson")
    assert (fraction, low, high) == pytest.approx((count / 3, expected.low, expected.high))


def test_the_intervals_of_pooled_runs_are_of_seeds():
    """Runs of a seed copied many times over say no more than the seeds do."""
    hits = [True, True, False, True]
    rows = [{"seed": seed, "held_recovered": hit} for seed, hit in enumerate(hits)]
    alone = theorem2_report.recovered(rows, "held")
    halves = rows * 5 + [{"seed": seed, "held_recovered": seed > 0} for seed in range(4)] * 5
    fractions = [0.5, 1.0, 0.5, 1.0]
    expected = stats.t.interval(0.95, 3, np.mean(fractions), stats.sem(fractions))
    got = theorem2_report.recovered(halves, "held")
    np.testing.assert_allclose(got, (0.75, max(expected[0], 0), min(expected[1], 1)))
    assert alone[0] == theorem2_report.recovered(rows * 14, "held")[0]
    assert theorem2_report.recovered(rows[:1] * 3, "held") == (1.0, 0.0, 1.0)


@pytest.mark.slow
def test_a_run_leaves_rows_tables_and_figures(finished):
    path, rows = finished
    assert len(select(rows, part="training")) == 2 * 2 * 3
    assert len(select(rows, part="descent")) == 2 * 2 * 3
    for part in ("certificates", "curvature", "training", "descent"):
        kept = json.loads((path / f"{part}.json").read_text())
        assert kept == select(rows, part=part)
        assert len((path / f"{part}.csv").read_text().splitlines()) == 1 + len(kept)
    for name in ("phase", "descent"):
        assert (path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    text = (path / "table.md").read_text()
    assert theorem2_report.sentence(rows) in text
    assert "0 of 6 runs leave it" in text
    for said in ("3 seeds", "150 steps of Adam", "γ = 0.5", '"width": 8', "jax"):
        assert said in text
    assert "nan" not in text.lower()


@pytest.mark.slow
def test_the_sentence_is_computed_from_the_rows(finished):
    _, rows = finished
    other = [row | ({"held_awake": 1} if row["part"] == "training" else {}) for row in rows]
    assert "6 of 6 runs leave it" in theorem2_report.sentence(other)


@pytest.mark.slow
def test_a_second_start_does_nothing_again(finished, monkeypatch, capsys):
    path, rows = finished
    monkeypatch.setattr(stationary, "make_model", None)
    monkeypatch.setattr(escape, "make_model", None)  # would fail if called
    assert theorem2.run(tiny(), str(path)) == rows
    assert capsys.readouterr().out.count("finished before") == 6


@pytest.mark.slow
def test_another_config_is_refused(finished):
    path, _ = finished
    with pytest.raises(InputError, match=r"train.steps=150, and this one has train.steps=9"):
        theorem2.run(tiny(**{"train.steps": 9}), str(path))


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("data.variances", (1.0, 4.0), "data.variances=(1.0, 4.0) must fall"),
        ("data.variances", (1.0, 0.0), "data.variances=(1.0, 0.0) must be finite numbers above 0"),
        ("data.variances", (), "data.variances=() must list at least one value"),
        ("data.dim", 1, "data.dim must be at least 2"),
        ("data.examples", 2, "data.examples above it"),
        ("model.skips", ("diagonal",), "model.skips=('diagonal',) must be among"),
        ("model.blocks", (0,), "model.blocks=(0,) must be integers of at least 1"),
        ("model.kappas", (2, 2), "none twice"),
        ("model.activation", "rely", "model.activation='rely' must be one of"),
        ("certificate.activations", ("rely",), "certificate.activations=('rely',)"),
        ("certificate.gamma", 0.0, "certificate.gamma=0.0"),
        ("curvature.gammas", (-1.0,), "curvature.gammas=(-1.0,)"),
        ("train.seeds", (-1,), "train.seeds=(-1,)"),
        ("train.delta", 0.0, "train.delta=0.0"),
        ("train.gammas", (float("nan"),), "train.gammas=(nan,)"),
        ("train.steps", 0, "train.steps=0"),
        ("descent.learning_rate", float("inf"), "descent.learning_rate=inf"),
    ],
)
def test_bad_fields_are_named_before_any_work(refused, field, value, said):
    refused(theorem2.run, tiny(**{field: value}), said)


def test_the_shipped_config_passes_its_checks():
    theorem2.check(config_file.get_config())
