import numpy as np
import pytest
from scipy import spatial, stats
from sklearn.cluster import KMeans

from vaebal.measures.ndb import ndb, ndb_bins, ndb_compare


def _normal(seed, n, d):
    return np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)


@pytest.fixture(scope="module")
def halves():
    """Two halves of one set: a mixture, so that bins have unequal sizes."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40_000, 8)) * rng.choice([0.3, 1.0, 2.0], size=(40_000, 1))
    return np.split(x.astype(np.float32), 2)


@pytest.mark.parametrize("bins", [100, 200, 300])
def test_two_halves_of_one_set_differ_in_a_twentieth_of_the_bins(halves, bins):
    train, query = halves
    got = ndb(train, query, bins, seed=0)
    low, high = stats.binom.interval(0.99, bins, 0.05)
    assert low <= got.ndb * bins <= high
    # 8 js / (1/N + 1/M) is near chi-squared with K - 1 degrees of freedom.
    statistic = 8 * got.js / (1 / len(train) + 1 / len(query))
    low, high = stats.chi2(bins - 1).interval(0.999)
    assert low < statistic < high


def test_first_centres_from_a_part_lead_to_clusters_as_tight(halves):
    """As scikit-learn's own from all examples."""
    train, _ = halves
    bins = ndb_bins(train, 100, seed=0)
    squares = np.square(train - bins.centres[bins.assign(train)]).sum()
    whole = KMeans(100, n_init=1, max_iter=100, random_state=0).fit(train).inertia_
    assert squares == pytest.approx(whole, rel=0.02)


def test_proportions_scores_and_divergence_equal_scipys():
    train, query = _normal(0, 600, 3), _normal(1, 500, 3) + 0.3
    got = ndb(train, query, 7, seed=0)
    p, q = np.rint(got.train * 600).astype(int), np.rint(got.query * 500).astype(int)
    assert (p.sum(), q.sum()) == (600, 500)
    np.testing.assert_allclose(got.train, p / 600)
    # Without continuity correction, the two-by-two table's chi-squared is the z-score squared.
    tests = [
        stats.chi2_contingency([[a, 600 - a], [b, 500 - b]], correction=False)
        for a, b in zip(p, q, strict=True)
    ]
    np.testing.assert_allclose(np.square(got.z), [test.statistic for test in tests], rtol=1e-10)
    np.testing.assert_array_equal(np.sign(got.z), np.sign(got.query - got.train))
    np.testing.assert_array_equal(got.different, [test.pvalue < 0.05 for test in tests])
    assert got.ndb == np.mean([test.pvalue < 0.05 for test in tests])
    assert 0 < got.ndb < 1
    divergence = spatial.distance.jensenshannon(got.train, got.query) ** 2
    np.testing.assert_allclose(got.js, divergence, rtol=1e-10)


def test_bins_are_the_nearest_centres_and_centres_the_means_of_their_examples():
    train = _normal(0, 500, 4)
    bins = ndb_bins(train, 9, seed=0)
    nearest = spatial.distance.cdist(train, bins.centres).argmin(1)
    np.testing.assert_array_equal(bins.assign(train), nearest)
    np.testing.assert_array_equal(bins.counts, np.bincount(nearest))
    means = [train[nearest == k].mean(0) for k in range(9)]
    np.testing.assert_allclose(bins.centres, means, atol=1e-5)


def test_a_set_does_not_differ_from_itself_and_a_lost_mode_is_found():
    modes = 10 * np.eye(6, dtype=np.float32)
    rng = np.random.default_rng(0)
    labels = rng.integers(6, size=1200)
    train = modes[labels] + 0.1 * _normal(1, 1200, 6)
    bins = ndb_bins(train, 6, seed=0)
    itself = ndb_compare(bins, train)
    assert (itself.ndb, itself.js) == (0, 0)
    # Mode 0 is lost; its share, a sixth, goes to mode 1.
    query = modes[np.where(labels == 0, 1, labels)] + 0.1 * _normal(2, 1200, 6)
    got = ndb_compare(bins, query)
    of_mode = spatial.distance.cdist(modes, bins.centres).argmin(1)
    np.testing.assert_array_equal(np.flatnonzero(got.different), np.sort(of_mode[:2]))
    assert got.ndb == 2 / 6
    assert got.z[of_mode[0]] < -10
    assert got.z[of_mode[1]] > 5
    assert got.query[of_mode[0]] == 0


def test_disjoint_sets_are_as_far_apart_as_can_be():
    bins = ndb_bins(np.concatenate([_normal(0, 50, 2), _normal(1, 50, 2) + 100]), 2, seed=0)
    empty = bins._replace(counts=np.array([100, 0]))
    far = ndb_compare(empty, bins.centres[[1] * 80])
    np.testing.assert_allclose(far.js, np.log(2))
    assert far.ndb == 1


def test_clusters_are_reused_and_the_seed_decides_them():
    train, query = _normal(0, 400, 3), _normal(1, 300, 3)
    one, again, other = (ndb_bins(train, 8, seed=s) for s in (3, 3, 4))
    np.testing.assert_allclose(one.centres, again.centres, rtol=1e-5)
    assert np.abs(one.centres - other.centres).max() > 0.01
    reused, direct = ndb_compare(one, query), ndb(train, query, 8, seed=3)
    assert (reused.ndb, reused.js) == (direct.ndb, direct.js)


def test_whitening_makes_units_irrelevant():
    train, query = _normal(0, 800, 3), _normal(1, 700, 3)
    units = np.array([1.0, 100.0, 0.01], np.float32)[None, :]
    plain = ndb(train, query, 10, seed=0, whiten=True)
    scaled = ndb(train * units + 5, query * units + 5, 10, seed=0, whiten=True)
    np.testing.assert_allclose(scaled.train, plain.train, atol=2 / 800)
    np.testing.assert_allclose(scaled.query, plain.query, atol=2 / 700)
    np.testing.assert_allclose(scaled.centres, plain.centres * units + 5, atol=0.1, rtol=0.01)
    # Without it the large unit alone decides.
    raw = ndb_bins(train * units, 10, seed=0)
    alone = spatial.distance.cdist(train[:, 1:2], raw.centres[:, 1:2] / 100).argmin(1)
    np.testing.assert_array_equal(raw.assign(train * units), alone)


def test_whitening_makes_nothing_of_constant_dimensions():
    """Neither of their mean's rounding, which is divided by 1e-6, nor of their centres'."""
    train, query = _normal(0, 3000, 3), _normal(1, 700, 3)
    plain = ndb(train, query, 10, seed=0, whiten=True)
    constant = np.full((3000, 9), 128 / 255, np.float32)
    more = np.concatenate([train, constant], 1), np.concatenate([query, constant[:700]], 1)
    bins = ndb_bins(more[0], 10, seed=0, whiten=True)
    assert ndb_compare(bins, more[0]).js < 1e-4
    got = ndb_compare(bins, more[1])
    np.testing.assert_allclose(got.train, plain.train, atol=2 / 3000)
    np.testing.assert_allclose(got.query, plain.query, atol=2 / 700)
    np.testing.assert_array_equal(bins.centres[:, 3:], constant[:10])


def test_above_a_thousand_dimensions_centres_are_still_means_in_all_of_them():
    rng = np.random.default_rng(0)
    modes = rng.normal(size=(4, 1200))
    labels = rng.permutation(np.repeat(np.arange(4), [40, 50, 60, 70]))
    train = (modes[labels] + 0.1 * rng.normal(size=(220, 1200))).astype(np.float32)
    got = ndb(train, train, 4, seed=0)
    order = spatial.distance.cdist(modes, got.centres).argmin(1)
    np.testing.assert_allclose(got.train[order], np.array([40, 50, 60, 70]) / 220)
    means = [train[labels == k].mean(0) for k in range(4)]
    np.testing.assert_allclose(got.centres[order], means, atol=1e-5)
    assert got.ndb == 0


def test_above_a_thousand_dimensions_a_random_sixth_decides_the_clusters():
    """Two modes apart in one dimension only are told apart where the seed draws that dimension."""
    train = _normal(0, 80, 1002)
    train[:40, 0] += 1000
    apart = [np.ptp(ndb_bins(train, 2, seed=s).centres[:, 0]) > 900 for s in range(20)]
    low, high = stats.binom.interval(0.999, 20, 1 / 6)
    assert max(low, 1) <= sum(apart) <= high


def test_above_a_thousand_dimensions_examples_are_told_apart_where_clusters_were_found():
    """What the other dimensions hold decides nothing."""
    train, query = _normal(1, 3000, 1206), _normal(2, 3000, 1206)
    bins = ndb_bins(train, 30, seed=0)
    assert len(bins.dimensions) == 1206 // 6
    np.testing.assert_array_equal(np.bincount(bins.assign(train)), bins.counts)
    aside = np.setdiff1d(np.arange(1206), bins.dimensions)
    other = query.copy()
    other[:, aside] += 1000 * train[:, aside]
    np.testing.assert_array_equal(bins.assign(other), bins.assign(query))


def test_bad_sets_are_refused():
    train = _normal(0, 20, 3)
    for arguments, message in (
        ((train, train, 21, 0), "train has 20 examples for 21 bins"),
        ((train, train, 1, 0), "bins is 1"),
        ((np.repeat(train[:3], 5, 0), train, 4, 0), "train has 3 distinct examples for 4 bins"),
        ((train, train[:, :2], 4, 0), "query has 2 dimensions where train has 3"),
        ((train, train[:0], 4, 0), r"query has shape \(0, 3\)"),
        ((train[:, 0], train, 4, 0), r"train has shape \(20,\)"),
        ((train * np.nan, train, 4, 0), "train has values that are not finite"),
        ((train, train + np.inf, 4, 0), "query has values that are not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            ndb(*arguments)
