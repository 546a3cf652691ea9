import numpy as np
import pytest
from scipy import linalg

from vaebal.measures.frechet import Moments, frechet_distance, frechet_estimate


def _covariance(rng, features, rank):
    factor = rng.normal(size=(features, rank)) * rng.random(rank)[None, :]
    return factor @ factor.T / rank


@pytest.mark.slow
def test_one_apart_in_2048_dimensions_is_exactly_2048():
    none, eye = np.zeros(2048), np.eye(2048)
    assert frechet_distance(none, eye, none + 1, eye) == 2048


@pytest.mark.parametrize(("rank1", "rank2"), [(60, 60), (20, 60), (60, 20), (20, 15), (1, 59)])
def test_equals_scipys_matrix_square_root(rank1, rank2):
    rng = np.random.default_rng(rank1)
    mean1, mean2 = rng.normal(size=(2, 60))
    cov1, cov2 = _covariance(rng, 60, rank1), _covariance(rng, 60, rank2)
    root = linalg.sqrtm(cov1 @ cov2)
    expected = ((mean1 - mean2) ** 2).sum() + np.trace(cov1 + cov2 - 2 * root).real
    got = frechet_distance(mean1, cov1, mean2, cov2)
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    np.testing.assert_allclose(frechet_distance(mean2, cov2, mean1, cov1), got, rtol=1e-6)


@pytest.mark.parametrize("shared", [0, 7])
def test_commuting_covariances_have_a_closed_form(shared):
    """The sum of (sigma_1 - sigma_2)^2 along shared axes, on overlapping or disjoint supports."""
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(30, 30)))[0]
    sigma1, sigma2 = np.zeros((2, 30))
    sigma1[: 10 + shared], sigma2[10:] = rng.random(10 + shared), 5 * rng.random(20)
    cov1, cov2 = ((basis * s[None, :] ** 2) @ basis.T for s in (sigma1, sigma2))
    got = frechet_distance(np.zeros(30), cov1, np.zeros(30), cov2)
    np.testing.assert_allclose(got, ((sigma1 - sigma2) ** 2).sum(), rtol=1e-6)


def test_small_variances_count_beside_a_large_one():
    """99 deviations of 1 and .9 beside one of 10^4 in both: 99 (.1)^2."""
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(100, 100)))[0]
    deviations = np.repeat([[1e4, 1.0], [1e4, 0.9]], [1, 99], axis=1)
    cov1, cov2 = ((basis * s[None, :] ** 2) @ basis.T for s in deviations)
    got = frechet_distance(np.zeros(100), cov1, np.zeros(100), cov2)
    np.testing.assert_allclose(got, 0.99, rtol=1e-4)


def test_is_a_squared_distance():
    """0 from itself, 0 between point masses in one place, and the triangle inequality."""
    rng = np.random.default_rng(1)
    (mean1, mean2, mean3), (cov1, cov2, cov3) = (
        rng.normal(size=(3, 12)),
        [_covariance(rng, 12, rank) for rank in (12, 5, 9)],
    )
    assert 0 <= frechet_distance(mean1, cov2, mean1, cov2) < 1e-6
    assert frechet_distance(mean1, 0 * cov1, mean1, 0 * cov1) == 0
    one, two, both = (
        np.sqrt(frechet_distance(*a, *b))
        for a, b in (
            ((mean1, cov1), (mean2, cov2)),
            ((mean2, cov2), (mean3, cov3)),
            ((mean1, cov1), (mean3, cov3)),
        )
    )
    assert abs(one - two) <= both <= one + two


def test_bad_moments_are_refused_by_name():
    mean, cov = np.zeros(3), np.eye(3)
    skewed, negative = cov + np.triu(np.ones((3, 3)), 1), np.diag([1.0, 1.0, -0.5])
    for arguments, message in (
        ((mean, cov, np.zeros(2), cov), r"mean2 has shape \(2,\); give \(3,\)"),
        ((mean, cov, mean, np.eye(4)), r"cov2 has shape \(4, 4\); give \(3, 3\)"),
        ((mean[None], cov, mean, cov), r"mean1 has shape \(1, 3\)"),
        ((mean, skewed, mean, cov), "cov1 is not symmetric"),
        ((mean, cov, mean, skewed), "cov2 is not symmetric"),
        ((mean, negative, mean, cov), "cov1 has an eigenvalue below 0"),
        ((mean, cov, mean, negative), "cov2 has an eigenvalue below 0"),
        ((mean, cov * np.nan, mean, cov), "cov1 has values that are not finite"),
        ((mean + np.inf, cov, mean, cov), "mean1 has values that are not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            frechet_distance(*arguments)


@pytest.mark.parametrize("sizes", [[50], [1] * 50, [1, 2, 30, 17], [49, 1]])
def test_moments_equal_numpys_whatever_the_blocks(sizes):
    """Far from 0, where sums of squares would lose every digit of the covariance."""
    features = np.random.default_rng(0).normal(size=(50, 6)) + 1e6
    blocks = np.split(features, np.cumsum(sizes)[:-1])
    streamed = Moments.empty(6)
    for block in blocks:
        streamed = streamed.update(block)
    merged = Moments.empty(6)
    for block in blocks[::-1]:
        merged = Moments.empty(6).update(block).merge(merged)
    for moments in (streamed, merged, merged.merge(Moments.empty(6))):
        assert moments.count == 50
        np.testing.assert_allclose(moments.mean, features.mean(0), rtol=1e-14)
        np.testing.assert_allclose(moments.covariance, np.cov(features.T), rtol=1e-8, atol=1e-9)


def test_float32_features_are_accumulated_in_float64():
    features = (np.random.default_rng(0).normal(size=(4000, 3)) + 300).astype(np.float32)
    moments = Moments.empty(3)
    for block in np.split(features, 400):
        moments = moments.update(block)
    np.testing.assert_allclose(moments.covariance, np.cov(features.T.astype(float)), rtol=1e-11)


def test_bad_features_are_refused():
    empty = Moments.empty(2)
    for features, message in (
        (np.zeros((3, 4)), r"features has shape \(3, 4\); give \[B, 2\]"),
        (np.zeros((0, 2)), r"features has shape \(0, 2\)"),
        (np.zeros(2), r"features has shape \(2,\)"),
        (np.array([[0.0, np.nan]]), "features has values that are not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            empty.update(features)
    with pytest.raises(ValueError, match="other has 3 features where these have 2"):
        empty.merge(Moments.empty(3))
    with pytest.raises(ValueError, match="count is 1"):
        _ = empty.update(np.zeros((1, 2))).covariance


def _estimates(width, shift, replicates=60, n=300, m=500, features=8):
    for seed in range(replicates):
        rng = np.random.default_rng(seed)
        yield frechet_estimate(
            width * rng.normal(size=(n, features)) + shift,
            rng.normal(size=(m, features)),
            seed=seed,
        )


@pytest.mark.parametrize(("width", "shift"), [(1.0, 0.0), (0.7, 0.3)])
def test_extrapolation_takes_the_bias_away_and_states_its_error(width, shift):
    """Between isotropic Gaussians the distance is F ((1 - width)^2 + shift^2).

    The error is right where the distributions differ and up to twice the spread where they are
    equal; the spread of 60 replicates is known to 10 per cent.
    """
    expected = 8 * ((1 - width) ** 2 + shift**2)
    estimates = list(_estimates(width, shift))
    value, extrapolated, error = (
        np.array([getattr(e, name) for e in estimates])
        for name in ("value", "extrapolated", "error")
    )
    spread = extrapolated.std(ddof=1)
    standard_error = spread / np.sqrt(len(estimates))
    assert value.mean() - expected > 5 * standard_error
    # Within 3 standard errors and the next order of the bias, far below the bias itself.
    bias = value.mean() - expected
    assert abs(extrapolated.mean() - expected) < 3 * standard_error + 0.05 * bias
    assert 0.75 < np.sqrt(np.square(error).mean()) / spread < (2.2 if shift == 0 else 1.3)


def test_estimate_of_all_examples_is_the_distance_and_the_seed_decides_the_rest():
    rng = np.random.default_rng(0)
    features, reference = rng.normal(size=(60, 3)), 2 * rng.normal(size=(80, 3))
    one, again, other = (frechet_estimate(features, reference, seed=s, parts=4) for s in (0, 0, 1))
    expected = frechet_distance(
        features.mean(0), np.cov(features.T), reference.mean(0), np.cov(reference.T)
    )
    np.testing.assert_allclose([one.value, one.values[0], other.value], expected, rtol=1e-10)
    np.testing.assert_array_equal(one.subsets, again.subsets)
    assert one.extrapolated != other.extrapolated
    np.testing.assert_allclose(one.counts, [60, 30, 20, 15])
    np.testing.assert_allclose(one.values[-1], one.subsets.mean())
    slope, intercept = np.polyfit(1 / one.counts, one.values, 1)
    np.testing.assert_allclose(one.extrapolated, intercept, rtol=1e-10)
    assert slope > 0
    assert one.warning == ""


def test_a_singular_covariance_is_named():
    rng = np.random.default_rng(0)
    few, many = rng.normal(size=(20, 20)), rng.normal(size=(90, 20))
    warning = frechet_estimate(few, many, seed=0, parts=2).warning
    assert warning.startswith("20 examples of 20 features: covariance is singular")
    warning = frechet_estimate(many, many, seed=0, parts=5).warning
    assert warning.startswith("subsets of 18 examples of 20 features")
    assert frechet_estimate(many, many, seed=0, parts=4).warning == ""


def test_bad_estimates_are_refused():
    good = np.zeros((10, 2))
    for features, reference, parts, message in (
        (good, good[:, :1], 2, r"features has shape \(10, 2\)"),
        (good, good[:, 0], 2, r"features has shape \(10, 2\)|reference has shape \(10,\)"),
        (good[:, 0], good, 2, r"features has shape \(10,\)"),
        (good[:7], good, 4, "7 examples make 4 subsets of fewer than 2"),
        (good, good, 1, "parts is 1"),
        (good, good + np.nan, 2, "reference has values that are not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            frechet_estimate(features, reference, seed=0, parts=parts)
