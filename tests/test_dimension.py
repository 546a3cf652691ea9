"""Intrinsic dimension on sets whose dimension is known."""

import numpy as np
import pytest

from vaebal.diagnosis.dimension import (
    calibrated,
    data_dimension,
    maximum_likelihood,
    two_nn,
)
from vaebal.measures.evaluation import Estimate


def cube(dimension, size=2000, seed=0, pixels=30):
    """Uniform on a cube, turned in `pixels` dimensions."""
    random = np.random.default_rng(seed)
    frame = np.linalg.qr(random.standard_normal((pixels, dimension)))[0]
    return random.random((size, dimension)) @ frame.T


def sphere(dimension, size=2000, seed=0):
    """Uniform on the unit sphere in dimension + 1 coordinates."""
    points = np.random.default_rng(seed).standard_normal((size, dimension + 1))
    return points / np.linalg.norm(points, axis=1, keepdims=True)


@pytest.mark.parametrize("estimator", [two_nn, maximum_likelihood])
@pytest.mark.parametrize("dimension", [1, 2, 4])
@pytest.mark.parametrize("kind", [cube, sphere])
def test_low_dimensions_are_found_as_published(estimator, dimension, kind):
    assert estimator(kind(dimension)).value == pytest.approx(dimension, rel=0.1)


@pytest.mark.parametrize("dimension", [1, 3, 6, 10])
@pytest.mark.parametrize("kind", [cube, sphere])
def test_calibration_undoes_the_bias_of_few_points(dimension, kind):
    found = data_dimension(kind(dimension, size=1000, seed=7))
    # Spheres have no boundary, so they look somewhat larger than the cubes of the calibration.
    assert found.value.value == pytest.approx(dimension, rel=0.08 if kind is cube else 0.2)
    if dimension == 10 and kind is cube:
        assert found.two_nn.value < 9
        assert found.maximum_likelihood.value < 9


def test_noise_below_the_distances_is_seen_through_by_thinning():
    points = cube(2, size=3200) + 0.0015 * np.random.default_rng(1).standard_normal((3200, 30))
    found = data_dimension(points)
    finest, *_, coarsest = (estimate.value for _, estimate in found.scales)
    assert finest > 3  # the noise's dimensions
    assert found.value.value == coarsest == pytest.approx(2, abs=0.3)


def test_neither_scale_nor_place_nor_repeats_matter():
    points = cube(3, size=600)
    for other in (1e-6 * points, points + 1e4, np.concatenate([points, points])):
        assert two_nn(other).value == pytest.approx(two_nn(points).value, rel=1e-3)
        assert maximum_likelihood(other).value == pytest.approx(
            maximum_likelihood(points).value, rel=1e-3
        )


@pytest.mark.parametrize("estimator", [two_nn, maximum_likelihood])
def test_standard_errors_are_those_of_repetition(estimator):
    estimates = [estimator(cube(3, size=500, seed=seed, pixels=3)) for seed in range(25)]
    spread = np.std([estimate.value for estimate in estimates], ddof=1)
    # Neighbours share neighbours, so independence understates.
    assert 0.6 < np.mean([estimate.error for estimate in estimates]) / spread < 1.5


def test_calibration_inverts_itself_and_keeps_order():
    values = [calibrated(Estimate(v, 0.1), "TwoNN", 500).value for v in (0.5, 1, 2.5, 5, 7)]
    assert values == sorted(values)
    measured = np.mean([two_nn(cube(5, 500, seed, 5)).value for seed in range(10)])
    assert calibrated(Estimate(measured, 0.1), "TwoNN", 500).value == pytest.approx(5, abs=0.25)


@pytest.mark.parametrize(
    ("points", "sentence"),
    [
        (np.zeros(30), "give .N, D."),
        (np.full((60, 2), np.nan), "not finite"),
        (np.zeros((100, 2)), "1 different rows"),
        (np.random.default_rng(0).random((20, 2)), "20 different rows"),
    ],
)
def test_points_that_say_nothing_are_refused(points, sentence):
    for estimator in (two_nn, maximum_likelihood, data_dimension):
        with pytest.raises(ValueError, match=sentence):
            estimator(points)
