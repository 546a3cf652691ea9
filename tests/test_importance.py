"""Sums of importance weights, against float64 all at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import logsumexp

from vaebal.measures import importance


@pytest.mark.parametrize("level", [0.0, 3e4, -1e5])
def test_the_sums_are_those_of_float64_whatever_the_weights_size(level):
    """In units in which float32's own rounding of one weight is 1/128."""
    log_w = np.float32(level + np.random.default_rng(0).normal(size=(3000, 4)))

    def one(sums, each):
        return importance.add(sums, *each), None

    start = importance.empty(jnp.zeros(4))
    sums, _ = jax.lax.scan(one, start, (jnp.asarray(log_w), jnp.arange(3000)))
    nll, effective = importance.bound(sums, 3000)
    exact = log_w.astype(float)
    np.testing.assert_allclose(nll, np.log(3000) - logsumexp(exact, 0), rtol=0, atol=1e-3)
    expected = np.exp(2 * logsumexp(exact, 0) - logsumexp(2 * exact, 0))
    np.testing.assert_allclose(effective, expected, rtol=2e-3)


def test_weights_that_are_0_count_for_nothing():
    sums = importance.empty(jnp.zeros(()))
    for index, log_w in enumerate((-jnp.inf, 2.0, -jnp.inf, 2.0)):
        sums = importance.add(sums, jnp.asarray(log_w), index)
    nll, effective = importance.bound(sums, 4)
    assert float(nll) == pytest.approx(np.log(2) - 2, rel=1e-6)
    assert float(effective) == pytest.approx(2, rel=1e-6)
