"""Precision, recall, density, coverage and copying against their definitions and expectations."""

import math

import numpy as np
import pytest

from vaebal.measures.neighbours import copying, manifolds, nearest


def by_definition(real, samples, k):
    """The four, by loops over all pairs."""
    distance = lambda a, b: math.dist(a, b)  # noqa: E731

    def radius(points, i):
        return sorted(distance(points[i], p) for j, p in enumerate(points) if j != i)[k - 1]

    of_real = [radius(real, i) for i in range(len(real))]
    of_samples = [radius(samples, j) for j in range(len(samples))]
    held = [[distance(x, y) <= r for y in samples] for x, r in zip(real, of_real, strict=True)]
    back = [[distance(x, y) <= r for y, r in zip(samples, of_samples, strict=True)] for x in real]
    return (
        np.mean([any(column) for column in zip(*held, strict=True)]),
        np.mean([any(row) for row in back]),
        np.sum(held) / (k * len(samples)),
        np.mean([any(row) for row in held]),
    )


def test_manifolds_are_what_their_papers_define():
    rng = np.random.default_rng(0)
    real, samples = rng.normal(size=(40, 3)), 0.6 * rng.normal(size=(25, 3)) + 0.5
    for k in (1, 3, 5):
        np.testing.assert_allclose(manifolds(real, samples, k), by_definition(real, samples, k))


def test_of_one_distribution_density_and_coverage_have_their_known_expectations():
    rng, k, n = np.random.default_rng(1), 3, 120
    got = [manifolds(*rng.normal(size=(2, n, 4)), k) for _ in range(60)]
    # Naeem et al., 2020: 1, and 1 - (N-1)...(N-k) / ((2N-1)...(2N-k)), whatever the distribution.
    coverage = 1 - math.prod((n - i) / (2 * n - i) for i in range(1, k + 1))
    assert np.mean([each.coverage for each in got]) == pytest.approx(coverage, abs=0.015)
    assert np.mean([each.density for each in got]) == pytest.approx(1.0, abs=0.05)


def test_the_kth_neighbour_lies_in_the_ball_that_it_bounds():
    """Far from 0, where two ways to a distance differ: a set's balls hold k + 1 of itself each."""
    points = np.random.default_rng(0).normal(size=(400, 64)) + 10
    assert manifolds(points, points, 5).density == pytest.approx(6 / 5, rel=1e-12)


def test_a_hundredth_of_fresh_draws_counts_as_copied():
    """Below the least of 99 lies a hundredth of the distribution on average."""
    rng = np.random.default_rng(4)
    for size in (99, 250):
        got = [copying(rng.random(size), rng.random(300)).copied for _ in range(300)]
        assert np.mean(got) == pytest.approx(0.01, abs=4 * np.std(got) / np.sqrt(300))


def test_precision_sees_what_is_false_and_recall_what_is_missing():
    rng = np.random.default_rng(2)
    real = np.concatenate([rng.normal(size=(200, 2)), rng.normal(size=(200, 2)) + 50])
    half = manifolds(real, rng.normal(size=(400, 2)))
    assert half.precision > 0.9
    assert half.recall == pytest.approx(0.5, abs=0.05)
    assert half.coverage < 0.55
    false = manifolds(real[:200], np.concatenate([rng.normal(size=(200, 2)), real[200:]]))
    assert false.precision == pytest.approx(0.5, abs=0.05)
    assert false.recall > 0.9


def test_copies_are_told_from_fresh_draws():
    rng = np.random.default_rng(3)
    train, held_out, fresh = rng.normal(size=(3, 600, 6))
    theirs = nearest(train, held_out)
    assert theirs[0] == pytest.approx(min(math.dist(held_out[0], x) for x in train))
    assert copying(theirs, nearest(train, fresh)).nearer == pytest.approx(0.5, abs=0.05)
    copies = copying(theirs, nearest(train, train + 0.01 * fresh))
    assert copies.nearer > 0.999
    assert copies.copied > 0.99
    assert copying(theirs, nearest(train, 3 * fresh)).nearer < 0.1
    # By definition: the share of pairs in which the sample is nearer, ties counted half.
    assert copying(np.array([1.0, 2.0]), np.array([1.0, 1.5, 3.0])).nearer == pytest.approx(2.5 / 6)


@pytest.mark.parametrize(
    ("real", "samples", "k", "message"),
    [
        (np.ones((4, 2)), np.ones((4, 3)), 1, "equal numbers"),
        (np.ones((4, 2)), np.ones((3, 2)), 3, "k is 3"),
        (np.ones(4), np.ones((3, 2)), 1, "real has shape"),
        (np.ones((4, 2)), np.full((4, 2), np.nan), 1, "samples has values"),
    ],
)
def test_what_cannot_be_compared_is_refused(real, samples, k, message):
    with pytest.raises(ValueError, match=message):
        manifolds(real, samples, k)
