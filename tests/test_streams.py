import itertools

import jax
import numpy as np

from vaebal.streams import stream


def test_a_stream_is_a_function_of_its_arguments():
    assert (
        jax.random.key_data(stream(3, "noise", 5)) == jax.random.key_data(stream(3, "noise", 5))
    ).all()


def test_streams_differ_in_seed_name_and_index():
    arguments = itertools.product(
        (0, 1), ("init", "order", "noise"), ((), (0,), (1,), (0, 1), (1, 0))
    )
    keys = [tuple(np.asarray(jax.random.key_data(stream(s, n, *i)))) for s, n, i in arguments]
    assert len(set(keys)) == len(keys)


def test_seed_and_index_may_be_traced():
    inside = jax.jit(lambda seed, step: jax.random.key_data(stream(seed, "noise", step)))(3, 5)
    np.testing.assert_array_equal(inside, jax.random.key_data(stream(3, "noise", 5)))
