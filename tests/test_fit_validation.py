"""The data sets of known dimension on which `fit` is judged, and how its hits are counted."""

import numpy as np
import pytest

from vaebal.estimator.validation import CLOSED, Known, draw, known, on_closed, page


@pytest.mark.parametrize("seed", range(200, 206))
def test_a_set_has_its_shape_dimension_noise_and_scale(seed):
    of = known(seed)._replace(examples=300, rank=min(known(seed).rank, 4))
    x = draw(of)
    assert x.shape == (300, of.dim)
    clean = draw(of._replace(noise=0.0, scale=1.0, shift=0.0))
    noisy = draw(of._replace(noise=0.01, scale=1.0, shift=0.0))
    assert (noisy - clean).std() == pytest.approx(0.01, rel=0.05)
    np.testing.assert_allclose((x - of.shift) / of.scale, noisy if of.noise else clean, atol=1e-7)
    if of.kind == "linear":
        spectrum = np.linalg.svd(clean - clean.mean(0), compute_uv=False)
        assert (spectrum > 1e-4 * spectrum[0]).sum() == of.rank


def test_points_of_closed_shapes_lie_on_them():
    factors = np.random.default_rng(0).uniform(size=(500, 2))
    circle = 2 * on_closed("circle", factors[:, :1]) - 1
    np.testing.assert_allclose(np.square(circle).sum(1), 1)
    sphere = 2 * on_closed("sphere", factors) - 1
    np.testing.assert_allclose(np.square(sphere).sum(1), 1)
    assert np.abs(sphere.mean(0)).max() < 0.1  # evenly over its area
    x, y, z = 1.5 * (2 * on_closed("torus", factors) - 1).T
    np.testing.assert_allclose((np.hypot(x, y) - 1) ** 2 + z**2, 0.25)
    for kind, (rank, dim) in CLOSED.items():
        assert draw(Known(kind, rank, 20, 50, 0.0, 1.0, 0.0, 3)).shape == (20, 50)
        assert on_closed(kind, factors[:, :rank]).shape == (500, dim)


def test_only_the_very_dimension_is_a_hit():
    """One latent too many, or too few, is none."""
    row = known(200)._asdict() | {"settled": True, "error_share": 0.1, "gamma": 1.0, "seconds": 2.0}
    rows = [row | {"rank": 3, "dimension": d, "seed": 200 + i} for i, d in enumerate((3, 4, 2, 3))]
    text = page(rows, 4)
    assert "2 of 4" in text
    assert "--seed=200 --sets=4`" in text
