"""The experiment on Theorem 3, as a user runs it, and the claims of its rows."""

import json

import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import theorem3 as config_file
from vaebal.errors import InputError
from vaebal.experiments.theorem3 import digits, linear
from vaebal.experiments.theorem3 import page as theorem3_report
from vaebal.experiments.theorem3 import run as theorem3
from vaebal.theory.penalties import named


def tiny(**changes) -> ConfigDict:
    """The experiment made so small that it takes seconds; the linear part still converges."""
    config = config_file.get_config()
    fields = {
        "linear.penalties": ("u", "sqrt(u)", "log(u+1e-4)", "I[u>1e-8]"),
        "linear.kappas": (3, 5),
        "linear.seeds": (0, 1),
        "linear.starts": 4,
        "linear.steps": 1200,
        "power.exponents": (0.3, 0.5, 0.7),
        "power.kappa": 5,
        "digits.penalties": ("log(u+1e-6)",),
        "digits.without_homotopy": ("log(u+1e-6)",),
        "digits.kappa": 6,
        "digits.width": 8,
        "digits.seeds": (0, 1),
        "digits.steps": 3,
        "digits.ranks": (2, 64),
    }
    config.update_from_flattened_dict(fields | changes)
    return config


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One small run, made once for the tests below."""
    path = tmp_path_factory.mktemp("theorem3") / "run"
    return path, theorem3.run(tiny(), str(path))


def select(rows, **fields):
    """The rows with these fields; a loop over none of them would assert nothing."""
    found = [row for row in rows if all(row.get(name) == v for name, v in fields.items())]
    assert found, fields
    return found


@pytest.mark.slow
def test_a_run_leaves_rows_tables_and_figures(finished):
    path, rows = finished
    cells = 2 * 2
    assert len(select(rows, part="linear")) == cells * (3 * 2 + 1)  # with homotopy or not; I
    assert len(select(rows, part="counterexamples")) == 4
    assert len(select(rows, part="power")) == 3 * 2
    assert len(select(rows, part="digits")) == 2 * 2 * 2
    for part in ("linear", "counterexamples", "power", "digits"):
        kept = json.loads((path / f"{part}.json").read_text())
        assert kept == select(rows, part=part)
        assert len((path / f"{part}.csv").read_text().splitlines()) == 1 + len(kept)
    for name in ("linear", "power", "digits"):
        assert (path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    text = (path / "table.md").read_text()
    for said in ("κ = 5", "2 seeds 0, 1", "best of 4", "I[u>1e-8] is evaluated", "1438 images"):
        assert said in text
    assert "nan" not in text.lower()


@pytest.mark.slow
def test_the_linear_rows_say_what_theorem_3_says(finished):
    _, rows = finished
    for row in select(rows, part="linear", kappa=5):
        if row["homotopy"] is False:
            continue
        if row["penalty"] == "u":
            assert not row["zero_error"]
            assert row["active"] == 5
            assert row["energy_above_svd"] < -0.1
        elif row["penalty"] == "sqrt(u)":
            assert row["zero_error"]
            assert row["active"] > 3
            assert abs(row["energy_above_svd"]) < 1e-4
        else:
            assert row["balanced"], row
    for row in select(rows, part="linear", penalty="u"):
        assert row["energy"] == pytest.approx(row["exact_energy"], rel=1e-9)
        assert row["error"] == pytest.approx(row["exact_error"], rel=1e-4)
    for row in select(rows, part="linear", penalty="I[u>1e-8]"):
        assert row["energy"] == row["exact_energy"] == 0.3
        assert row["balanced"]


@pytest.mark.slow
def test_a_finite_but_steep_slope_leaves_an_error_of_its_square(finished):
    """log(u+eps): (r/d)^2 eps^2 / E_0, by the scaling argument, for equal shrinking of all rows."""
    _, rows = finished
    for row in select(rows, part="linear", penalty="log(u+1e-4)", kappa=3, homotopy=True):
        mean_square = row["error"] / row["relative_error"]
        # Were all rows of one length it would be 1 (Cauchy and Schwarz); here up to 2.8.
        assert 0.99 < row["error"] / (0.3**2 * 1e-8 / mean_square) < 4


@pytest.mark.slow
def test_counterexamples_come_with_both_energies(finished):
    _, rows = finished
    for row in select(rows, part="counterexamples"):
        undercut = row["slope_at_zero"] != "inf"
        assert row["shrinking_pays"] == row["splitting_pays"] == undercut
        if undercut:
            assert row["energy_shrunk"] < row["energy_balanced"]
            assert row["energy_split"] < row["energy_balanced"]
            assert row["split_rows"] > row["rank"]
        else:
            assert row["energy_split"] >= row["energy_balanced"] - 1e-12


def test_an_indicator_with_a_tolerance_stands_for_the_count():
    """Rows are counted as splitting leaves them, however small, not as the tolerance lets pass."""
    config = tiny(**{"linear.penalties": ("u", "I[u>1e-8]")})
    (row,) = select(linear.counterexample_rows(config), penalty="I[u>1e-8]")
    assert row["slope_at_zero"] == "inf"
    assert not row["shrinking_pays"]
    assert not row["splitting_pays"]
    assert row["energy_balanced"] == pytest.approx(3 / 10)
    assert row["energy_split"] == pytest.approx(6 / 10)


@pytest.mark.slow
def test_the_threshold_of_powers(finished):
    _, rows = finished
    for row in select(rows, part="power"):
        assert row["zero_error"] == (row["p"] <= 0.5)
        if row["p"] > 0.5:
            assert row["error"] == pytest.approx(row["exact_error"], rel=1e-3)
            assert row["error"] < row["scaling_error"] < 5 * row["error"] + 1
        else:
            assert row["scaling_error"] == 0.0
        assert (row["active"] == 3) == (row["p"] < 0.5)


@pytest.mark.slow
def test_the_sentence_is_computed_from_the_rows(finished):
    _, rows = finished
    said = theorem3_report.sentence(rows)
    assert "exactly 3 rows under log(u+1e-4), I[u>1e-8]" in said
    assert "more rows than that under sqrt(u)" in said
    assert "an error left under u;" in said
    assert "zero up to p = 0.5." in said
    other = [row | ({"zero_error": False} if row["part"] == "power" else {}) for row in rows]
    assert "no u^p reaches it" in theorem3_report.sentence(other)


def test_digits_of_a_rank():
    train, test = digits.digits_data(5)
    assert np.linalg.matrix_rank(train - train.mean(0, keepdims=True), tol=1e-3) == 5
    whole, _ = digits.digits_data(64)
    assert (train.shape, test.shape, whole.shape) == ((1438, 64), (359, 64), (1438, 64))
    error = np.square(train - whole).mean()
    assert error < 0.6 * np.square(whole - whole.mean(0, keepdims=True)).mean()
    assert whole.min() == 0
    assert whole.max() == 1


@pytest.mark.slow
def test_a_second_start_does_nothing_again(finished, monkeypatch, capsys):
    path, rows = finished
    monkeypatch.setattr(linear, "make_solver", None)  # would fail if called
    assert theorem3.run(tiny(), str(path)) == rows
    assert capsys.readouterr().out.count("finished before") == 6


@pytest.mark.slow
def test_a_lost_part_alone_is_made_again(finished):
    """And comes back equal but for the time it took."""
    path, rows = finished
    (path / "parts" / "linear_sqrt_u_.json").unlink()
    again = theorem3.run(tiny(), str(path))
    for before, after in zip(rows, again, strict=True):
        assert {k: v for k, v in before.items() if k != "seconds"} == {
            k: v for k, v in after.items() if k != "seconds"
        }


@pytest.mark.slow
def test_another_config_is_refused(finished):
    path, _ = finished
    with pytest.raises(InputError, match=r"linear.steps=1200, and this one has linear.steps=9"):
        theorem3.run(tiny(**{"linear.steps": 9}), str(path))


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("linear.penalties", ("u", "log u"), "linear.penalties: 'log u' is no penalty"),
        ("linear.penalties", ("u^2",), "linear.penalties: p = 2.0 must lie in"),
        ("linear.penalties", ("u^.5", "u^0.5"), "lists one penalty twice"),
        ("linear.penalties", ("I[u>0]",), "linear.penalties needs one that can be minimised"),
        ("linear.penalties", (), "linear.penalties=() must list at least one value"),
        ("linear.kappas", (2,), "linear.kappas=2 must be an integer of at least linear.rank=3"),
        ("linear.kappas", (3, 3), "none twice"),
        ("linear.seeds", (-1,), "linear.seeds=(-1,)"),
        ("linear.dim", 3, "linear.dim=3 must exceed linear.rank=3"),
        ("linear.examples", 2, "linear.examples=2 cannot have linear.rank=3"),
        ("linear.steps", 0, "linear.steps=0 must be an integer"),
        ("linear.smoothing_end", 0.0, "linear.smoothing_end=0.0"),
        ("linear.smoothing_end", 2.0, "linear.smoothing_end=2.0 must not exceed"),
        ("linear.active_share", 1.0, "linear.active_share=1.0 must lie between 0 and 1"),
        ("power.exponents", (0.0, 0.5), "power.exponents=(0.0, 0.5) must lie in (0, 1]"),
        ("power.kappa", 1, "power.kappa=1"),
        ("counterexamples.variance", -1.0, "counterexamples.variance=-1.0"),
        ("digits.penalties", ("I[u>0]",), "digits.penalties: 'I[u>0]' is evaluated"),
        ("digits.without_homotopy", ("u^0.25",), "'u^0.25' is not in digits.penalties"),
        ("digits.ranks", (0,), "digits.ranks=(0,) must be integers from 1 to 64"),
        ("digits.activation", "rely", "digits.activation='rely' must be one of"),
        ("digits.learning_rate", float("nan"), "digits.learning_rate=nan"),
        ("digits.smoothing_share", 0.0, "digits.smoothing_share=0.0 must lie in (0, 1]"),
        ("digits.decoder_layers", 0, "digits.decoder_layers=0"),
    ],
)
def test_bad_fields_are_named_before_any_work(refused, field, value, said):
    refused(theorem3.run, tiny(**{field: value}), said)


def test_the_shipped_config_passes_its_checks():
    theorem3.check(config_file.get_config())


@pytest.mark.slow
def test_the_digits_keep_five_rows_of_sixteen_under_log_alone():
    """The deep claim of the shipped config, one seed: rank 5, u keeps all 16."""
    config = config_file.get_config()
    config.digits.seeds = (0,)
    config.digits.ranks = (5,)
    for formula, active in (("u", 16), ("log(u+1e-6)", 5)):
        rows = digits.digits_rows(config, named(formula))
        assert select(rows, homotopy=True)[0]["active"] == active
    scratch = select(rows, homotopy=False)[0]
    assert scratch["active"] == 0
    assert scratch["relative_error"] > 0.9
