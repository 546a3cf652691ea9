import json

import numpy as np
import pytest

from configs import theorem1 as config_file
from vaebal.experiments import run
from vaebal.experiments.theorem1 import page
from vaebal.experiments.theorem1 import run as theorem1
from vaebal.theory import affine
from vaebal.theory.landscape import affine_stationary_points


def config(**changes):
    made = config_file.get_config()
    made.update_from_flattened_dict(
        {"train.starts": 5, "train.steps": 2000, "eval.path": 5} | changes
    )
    return made


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    path = tmp_path_factory.mktemp("theorem1") / "run"
    return path, run(config(), str(path))


def test_every_index_is_measured_as_predicted(finished):
    _, rows = finished
    assert [row["index"] for row in rows] == [row["measured_index"] for row in rows]
    assert [row["nullity"] for row in rows] == [row["measured_nullity"] for row in rows]
    assert max(row["largest_gradient"] for row in rows) < 1e-8
    on_axes = [row for row in rows if row["axis_aligned"]]
    assert sorted(row["index"] for row in on_axes) == [0, 1, 2, 3, 4, 5, 6, 9]
    # a!/(a-q)! 2^q minima for a = 3 directions above gamma on q = 3 columns.
    assert [row["copies"] for row in rows if row["index"] == 0] == [48]


def test_the_ways_between_minima_have_the_heights_of_the_theory(finished):
    path, _ = finished
    ways = json.loads((path / "paths.json").read_text())
    for name in ("straight", "rotation", "lowest"):
        np.testing.assert_allclose([ways[name][0], ways[name][-1]], 0, atol=1e-9)
    assert max(ways["rotation"]) == pytest.approx(ways["rotation_theory"], rel=1e-9)
    assert max(ways["lowest"]) == pytest.approx(ways["saddle_theory"], rel=1e-6)
    assert max(ways["lowest"]) < max(ways["rotation"]) < max(ways["straight"])


def test_the_saddle_of_the_lowest_way_is_in_the_list():
    """Directions 1 and 2 shared by two columns: index 1, the pass between two minima."""
    mean, cov = theorem1.covariance(config())
    ways = theorem1.paths(config(), cov)
    least = affine.affine_global_minimum(cov, 3, 0.2)
    passes = [p for p in affine_stationary_points(mean, cov, 3, 0.2) if p.index == 1]
    heights = [point.energy - least for point in passes]
    assert np.isclose(heights, ways["saddle_theory"], rtol=1e-9).any()


def test_descents_fall_below_every_saddle():
    _, cov = theorem1.covariance(config())
    falls = theorem1.descents(config(), cov)
    assert falls.shape == (5, 2000)
    assert (np.diff(falls, axis=1) < 1e-9).all()
    assert (falls[:, -1] > -1e-9).all()
    assert (falls[:, -1] < 0.9 * theorem1.paths(config(), cov)["saddle_theory"]).all()


def test_the_report_is_written(finished):
    path, rows = finished
    assert (path / "landscape.png").read_bytes().startswith(b"\x89PNG")
    table = (path / "table.md").read_text()
    assert f"Of {len(rows)} stationary points" in table
    assert "none: total collapse" in table


def test_a_list_cut_before_the_minimum_is_reported_as_such(finished):
    path, rows = finished
    ways, falls = json.loads((path / "paths.json").read_text()), np.zeros((5, 1))
    whole, cut = (page.sentence(some, falls, ways) for some in (rows, rows[:10]))
    assert "only 1 is a minimum" in whole
    assert "its 48 copies" in whole
    assert "Of 10 stationary points" in cut
    assert "the list ends before the minimum" in cut


def test_the_order_of_the_eigenvalues_does_not_matter():
    falling, rising = (4.0, 2.0, 0.5, 0.1, 0.05), (0.05, 0.1, 0.5, 2.0, 4.0)
    theorem1.check(config(**{"data.eigenvalues": rising}))
    given = [theorem1.covariance(config(**{"data.eigenvalues": e}))[1] for e in (falling, rising)]
    np.testing.assert_array_equal(*given)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("data.eigenvalues", (1.0,), "data.eigenvalues=(1.0,)"),
        ("data.eigenvalues", (1.0, -1.0), "none below 0"),
        ("model.gamma", 0.0, "model.gamma=0.0"),
        ("model.gamma", 3.0, "leaves 1 active column"),
        ("model.kappa", 0, "model.kappa=0"),
    ],
)
def test_bad_fields_are_named(refused, field, value, said):
    refused(run, config(**{field: value}), said)
