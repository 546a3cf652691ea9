import gzip

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import special

from vaebal import data
from vaebal.data import idx
from vaebal.errors import InputError
from vaebal.generation import classifier


def nearest_mean_accuracy(images, targets):
    means = np.stack([images.train[targets.train == k].mean(0) for k in range(10)])
    distances = np.square(images.test[:, None] - means[None]).sum(-1)
    return (distances.argmin(1) == targets.test).mean()


def test_the_digits_labels_belong_to_their_images():
    images = data.load("digits")
    targets = classifier.targets_of(images)
    assert (targets.kind, targets.outputs) == ("labels", 10)
    assert nearest_mean_accuracy(images, targets) > 0.85
    shifted = targets._replace(test=np.roll(targets.test, 1))
    assert nearest_mean_accuracy(images, shifted) < 0.2


def test_factors_become_targets_on_the_training_splits_scale():
    images = data.manifold("rendered", rank=3, resolution=8, train_size=64, test_size=32)
    targets = classifier.targets_of(images)
    assert (targets.kind, targets.outputs) == ("factors", 3)
    np.testing.assert_allclose(targets.train.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(targets.train.std(0), 1, rtol=1e-5)
    std = images.train_factors.std(0)
    distances = (images.test_factors[1:] - images.test_factors[:-1]) / std
    np.testing.assert_allclose(targets.test[1:] - targets.test[:-1], distances, atol=1e-5)


def test_without_labels_or_factors_square_images_have_turns_and_others_nothing():
    rows = np.zeros((6, 64), np.uint8)
    targets = classifier.targets_of(data.ImageSet("folder", rows, rows[:3], (8, 8, 1)))
    assert (targets.kind, targets.outputs) == ("turns", 4)
    np.testing.assert_array_equal(targets.train, [0, 1, 2, 3, 0, 1])
    assert classifier.targets_of(data.ImageSet("folder", rows, rows, (4, 16, 1))) is None


def test_images_are_turned_by_what_is_told_of_them():
    shape = (4, 4, 3)
    images = np.random.default_rng(0).integers(0, 256, (4, 48), np.uint8)
    rows = data.ImageSet("folder", images, images, shape)
    targets = classifier.targets_of(rows)
    for key in (None, jax.random.key(1)):
        shown, told = classifier.posed(targets, shape, images, targets.test, key)
        for image, after, quarters in zip(images, np.asarray(shown), told, strict=True):
            expected = np.rot90(image.reshape(shape), int(quarters))
            np.testing.assert_array_equal(after.reshape(shape), expected)
    same = classifier.posed(targets._replace(kind="labels"), shape, images, told)
    assert same[0] is images
    assert same[1] is told


@pytest.mark.slow
def test_a_network_learns_how_far_images_were_turned():
    """On rendered scenes, whose light comes from somewhere; a guess is wrong in 3 of 4."""
    images = data.manifold("rendered", rank=3, resolution=16, train_size=512, test_size=128)
    plain = data.ImageSet("folder", images.train, images.test, images.image_shape)
    targets = classifier.targets_of(plain)
    model = classifier.build(images.image_shape, 4, features=16, width=64, activation=jax.nn.silu)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, images.dim)))["params"]
    optimiser = optax.adam(2e-3)
    state = optimiser.init(params)

    @jax.jit
    def step(params, state, key):
        to_rows, to_turns = jax.random.split(key)
        rows = jax.random.randint(to_rows, (64,), 0, len(images.train))
        x = images.decode(jnp.asarray(images.train)[rows])
        shown = classifier.posed(
            targets, images.image_shape, x, jnp.asarray(targets.train)[rows], to_turns
        )
        slope = jax.grad(lambda params: classifier.loss(model, params, *shown)[0])(params)
        change, state = optimiser.update(slope, state)
        return optax.apply_updates(params, change), state

    for key in jax.random.split(jax.random.key(2), 300):
        params, state = step(params, state, key)
    stored = np.round(255 * images.test).astype(np.uint8)
    wrong = classifier.share_wrong(model, params, stored, targets, images.image_shape, 64)
    assert wrong < 0.1


def model_and_params(shape, outputs=4):
    model = classifier.build(shape, outputs, features=6, width=8, activation=jax.nn.silu)
    x = jnp.zeros((1, np.prod(shape)))
    return model, jax.jit(model.init)(jax.random.key(0), x)["params"]


@pytest.mark.parametrize("shape", [(8, 8, 1), (32, 32, 3)])
def test_features_are_what_the_last_layer_reads(shape):
    model, params = model_and_params(shape)
    images = np.random.default_rng(0).integers(0, 256, (7, np.prod(shape)), np.uint8)
    features, outputs = classifier.features_and_outputs(model, params, images, 3)
    assert features.shape == (7, 6)
    last = params["last"]
    read = features @ np.asarray(last["kernel"]) + np.asarray(last["bias"])
    np.testing.assert_allclose(read, outputs, atol=1e-5)
    whole = model.apply({"params": params}, jnp.asarray(images, jnp.float32) / 255)
    np.testing.assert_allclose(outputs, whole, atol=1e-5)
    with pytest.raises(ValueError, match="type float32; give uint8"):
        classifier.features_and_outputs(model, params, images.astype(np.float32), 3)


def test_the_losses_by_hand():
    model, params = model_and_params((8, 8, 1))
    x = jnp.asarray(np.random.default_rng(0).random((5, 64)), jnp.float32)
    outputs = np.float64(model.apply({"params": params}, x))
    labels = np.array([0, 3, 2, 1, 1])
    value, metrics = classifier.loss(model, params, x, jnp.asarray(labels))
    by_hand = -special.log_softmax(outputs, 1)[np.arange(5), labels].mean()
    assert float(value) == pytest.approx(by_hand, rel=1e-5)
    assert float(metrics["wrong"]) == pytest.approx(classifier.wrong(outputs, labels))
    factors = np.random.default_rng(1).normal(size=(5, 4))
    value, _ = classifier.loss(model, params, x, jnp.asarray(factors, jnp.float32))
    assert float(value) == pytest.approx(np.square(outputs - factors).mean(), rel=1e-5)


def test_the_share_that_is_wrong():
    assert classifier.wrong(np.eye(4), np.array([0, 1, 2, 0])) == 0.25
    factors = np.random.default_rng(0).normal(size=(50, 3))
    assert classifier.wrong(factors, factors) == 0
    constant = np.broadcast_to(factors.mean(0), factors.shape)
    assert classifier.wrong(constant, factors) == pytest.approx(1.0)


def test_label_files_are_read_and_refused():
    content = bytes([0, 0, 8, 1, 0, 0, 0, 3, 7, 0, 9])
    np.testing.assert_array_equal(idx.parse_idx_labels(content), [7, 0, 9])
    for bad in (content[:-1], content + b"\0", bytes([0, 0, 8, 3]) + content[4:], b""):
        with pytest.raises(InputError, match="IDX label file must start with"):
            idx.parse_idx_labels(bad)


def test_label_files_are_checked_by_the_published_checksum(tmp_path):
    file = tmp_path / "mnist" / idx.LABEL_FILES["train"]
    file.parent.mkdir()
    file.write_bytes(gzip.compress(bytes([0, 0, 8, 1, 0, 0, 0, 1, 5])))
    with pytest.raises(InputError, match=r"train-labels.* is damaged or is not mnist's file"):
        idx.idx_labels("mnist", str(tmp_path))


def test_labels_of_a_set_that_tfds_has_shuffled_are_refused(tmp_path):
    (tmp_path / "mnist").mkdir()
    (tmp_path / "mnist" / "mnist-train.array_record-00000-of-00001").touch()
    with pytest.raises(InputError, match=r"prepared by TFDS .* in another order"):
        idx.idx_labels("mnist", str(tmp_path))
