import gzip
import hashlib
import io
import shutil
import urllib.error

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vaebal import data
from vaebal.data import digests, idx, sets
from vaebal.errors import InputError


def _idx_bytes(images):
    header = np.array([0x0803, *images.shape], ">u4").tobytes()
    return header + images.tobytes()


@pytest.fixture
def mnist_files(tmp_path, monkeypatch):
    """Small IDX files in a folder, with TFDS's registered checksums replaced by theirs."""
    import tensorflow_datasets as tfds

    rng = np.random.default_rng(0)
    infos, images = {}, {}
    for split, file in idx.IMAGE_FILES.items():
        images[split] = rng.integers(0, 256, (20 if split == "train" else 6, 28, 28), np.uint8)
        content = gzip.compress(_idx_bytes(images[split]))
        (tmp_path / file).write_bytes(content)
        info = type("Info", (), {"checksum": hashlib.sha256(content).hexdigest()})
        infos[f"https://example.invalid/mnist/{file}"] = info
    monkeypatch.setattr(tfds.image_classification.MNIST, "url_infos", infos)
    return tmp_path, images


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    digits = data.load("digits")
    assert (digits.train.shape, digits.test.shape, digits.dim) == ((1438, 64), (359, 64), 64)
    together = np.concatenate([digits.train, digits.test])
    assert sorted(map(tuple, together * 16)) == sorted(map(tuple, load_digits().data))
    counts = []
    for (images, labels), own in zip(
        data.digits_splits(), (digits.train, digits.test), strict=True
    ):
        np.testing.assert_array_equal(images, own)
        counts.append(np.bincount(labels))
    assert np.abs(counts[1] - sum(counts) * 359 / 1797).max() < 1  # one mixture of classes


@pytest.mark.parametrize("below", ["", "mnist", "downloads/manual"])
def test_mnist_from_raw_files(mnist_files, below):
    root, images = mnist_files
    if below:
        (root / below).mkdir(parents=True)
        for file in idx.IMAGE_FILES.values():
            (root / file).rename(root / below / file)
    got = data.load("mnist", str(root))
    assert got.image_shape == (28, 28, 1)
    np.testing.assert_array_equal(got.train, images["train"].reshape(20, 784))
    np.testing.assert_array_equal(got.test, images["test"].reshape(6, 784))


def test_the_directory_may_come_from_the_environment(mnist_files, monkeypatch):
    root, images = mnist_files
    monkeypatch.setenv("VAEBAL_DATA_DIR", str(root))
    np.testing.assert_array_equal(data.load("mnist").test, images["test"].reshape(6, 784))


def test_a_damaged_file_is_named(mnist_files):
    root, _ = mnist_files
    path = root / idx.IMAGE_FILES["test"]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match=f"{path} is damaged"):
        data.load("mnist", str(root))


def test_a_truncated_idx_file_is_told():
    content = _idx_bytes(np.zeros((3, 4, 4), np.uint8))
    assert idx.parse_idx_images(content).shape == (3, 4, 4)
    with pytest.raises(InputError, match="promises 48 pixels and holds 47"):
        idx.parse_idx_images(content[:-1])
    with pytest.raises(InputError, match="must start with"):
        idx.parse_idx_images(b"\x00\x00\x08\x01" + content[4:])
    for parse, kind in ((idx.parse_idx_images, "image"), (idx.parse_idx_labels, "label")):
        with pytest.raises(InputError, match=f"An IDX {kind} file must start with"):
            parse(content[:5])  # cut within a number


def test_missing_files_name_the_two_ways(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    with pytest.raises(InputError, match=r"(?s)network connection, or put train-images.*into"):
        data.load("mnist", str(tmp_path))


def test_missing_files_are_downloaded_and_checked(mnist_files, tmp_path, monkeypatch):
    root, images = mnist_files

    def serve(url, timeout):
        return io.BytesIO((root / url.rsplit("/")[-1]).read_bytes())

    monkeypatch.setattr("urllib.request.urlopen", serve)
    empty = tmp_path / "elsewhere"
    np.testing.assert_array_equal(
        data.load("mnist", str(empty)).train, images["train"].reshape(20, 784)
    )
    assert {path.name for path in empty.rglob("*") if path.is_file()} == set(
        idx.IMAGE_FILES.values()
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("minst", "data.name='minst' is not a known data set: did you mean 'mnist'?"),
        ("cifar10", "data.name='cifar10' was not found in data.dir"),
    ],
)
def test_unknown_and_unprepared_sets_are_told_apart(tmp_path, name, message):
    with pytest.raises(InputError) as error:
        data.load(name, str(tmp_path))
    assert message in str(error.value)


def _prepare_tfds(root, shape, splits=("train", "test")):
    """A real TFDS array_record set of random images, made on the spot."""
    import tensorflow_datasets as tfds
    from PIL import Image

    rng = np.random.default_rng(0)
    images = {split: rng.integers(0, 256, (7, *shape), np.uint8) for split in splits}

    class Blobs(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = tfds.features.FeaturesDict({"image": tfds.features.Image(shape=shape)})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(split) for split in splits}

        def _generate_examples(self, split):
            for i, image in enumerate(images[split]):
                # TFDS would encode an array with TensorFlow; it takes a PNG file as it is.
                file = io.BytesIO()
                Image.fromarray(image.squeeze()).save(file, "png")
                yield i, {"image": io.BytesIO(file.getvalue())}

    Blobs(data_dir=root, file_format="array_record").download_and_prepare()
    return images


@pytest.mark.filterwarnings("ignore")  # TFDS's own, while preparing
@pytest.mark.parametrize("channels", [1, 3])
def test_prepared_tfds_sets_are_read_by_name(tmp_path, channels):
    images = _prepare_tfds(tmp_path, (5, 4, channels))
    got = data.load("blobs", str(tmp_path))
    assert got.image_shape == (5, 4, channels)
    for split, read in (("train", got.train), ("test", got.test)):
        # TFDS stores a shuffled order.
        assert sorted(map(tuple, read)) == sorted(map(tuple, images[split].reshape(7, -1)))


@pytest.mark.filterwarnings("ignore")
def test_a_missing_split_is_told(tmp_path):
    _prepare_tfds(tmp_path, (5, 4, 1), splits=("train",))
    with pytest.raises(InputError, match="has no split 'test'"):
        data.load("blobs", str(tmp_path))


@pytest.mark.parametrize("value", [np.nan, np.inf, -0.1, 1.5])
def test_bad_pixels_are_found(value):
    test = np.zeros((4, 6), np.float32)
    test[2, 3] = value
    images = data.ImageSet("mine", np.zeros((4, 6), np.float32), test, (2, 3, 1))
    with pytest.raises(InputError, match="in image 2 of split 'test'"):
        sets.check_pixels(images)


def test_an_epoch_sees_every_image_at_most_once_and_orders_differ():
    order = np.asarray(data.epoch_order(0, 0, 50, 8))
    assert order.shape == (6, 8)
    assert len(np.unique(order)) == 48
    assert order.min() >= 0
    assert order.max() < 50
    for other in (data.epoch_order(0, 1, 50, 8), data.epoch_order(1, 0, 50, 8)):
        assert (np.asarray(other) != order).any()


def test_any_batch_can_be_asked_for_again():
    for step in (0, 5, 6, 23):
        expected = data.epoch_order(4, step // 6, 50, 8)[step % 6]
        np.testing.assert_array_equal(data.batch_indices(4, step, 50, 8), expected)


def test_all_images_come_equally_often():
    """Left-over images of an epoch are random: counts over 200 epochs are near binomial."""
    orders = jax.vmap(lambda epoch: data.epoch_order(0, epoch, 50, 8))(np.arange(200))
    counts = np.bincount(np.asarray(orders).ravel(), minlength=50)
    expected, spread = 200 * 48 / 50, np.sqrt(200 * 0.96 * 0.04)
    assert np.abs(counts - expected).max() < 5 * spread


def manifold(name="linear", **changes):
    options = {"rank": 3, "resolution": 8, "train_size": 30, "test_size": 10, "seed": 5}
    return data.manifold(name, **(options | changes))


def pixels_of(images):
    return np.concatenate([images.decode(jnp.asarray(s)) for s in (images.train, images.test)])


@pytest.mark.parametrize("name", data.MANIFOLDS)
def test_a_manifolds_images_are_the_same_stored_or_drawn(name, monkeypatch):
    stored = manifold(name)
    monkeypatch.setattr(sets, "STORED_BYTES", 0)
    drawn = manifold(name)
    assert stored.train.shape == (30, stored.dim) == (30, 8 * 8 * 3)
    for images in (stored, drawn):
        assert images.image_shape == (8, 8, 3)
        assert (images.train_factors.shape, images.test_factors.shape) == ((30, 3), (10, 3))
    np.testing.assert_array_equal(drawn.train, stored.train_factors)
    np.testing.assert_array_equal(drawn.test, stored.test_factors)
    np.testing.assert_allclose(pixels_of(drawn), pixels_of(stored), atol=1e-6)
    assert pixels_of(stored).min() >= 0
    assert pixels_of(stored).max() <= 1
    # A program compiled for one set serves another of the same kind.
    assert drawn.decode == manifold(name, rank=2).decode


def test_a_manifolds_images_are_functions_of_seed_and_index():
    """Another cut moves the border between the splits, no image; another seed moves them all."""
    images = pixels_of(manifold())
    np.testing.assert_allclose(pixels_of(manifold(train_size=12, test_size=28)), images, atol=1e-6)
    assert (np.abs(pixels_of(manifold(seed=6)) - images).max(1) > 0.01).all()
    apart = np.linalg.norm(images[:, None] - images[None], axis=-1)
    assert apart[np.triu_indices(40, 1)].min() > 1e-3  # so no test image is a training image


@pytest.mark.parametrize("rank", [1, 4, 12])
def test_a_linear_manifold_has_exactly_its_rank(rank):
    images = np.float64(pixels_of(manifold(rank=rank)))
    sizes = np.linalg.svd(images - images.mean(0), compute_uv=False)
    assert sizes[rank - 1] > 1e-2 * sizes[0]
    assert sizes[rank] < 1e-5 * sizes[0]


def test_the_factors_are_the_coordinates_of_a_linear_manifold():
    images = manifold()
    design = np.c_[np.ones(30), images.train_factors]
    weights, *_ = np.linalg.lstsq(design, np.float64(images.train), rcond=None)
    predicted = np.c_[np.ones(10), images.test_factors] @ weights
    np.testing.assert_allclose(predicted, images.test, atol=1e-5)


def test_observation_noise_is_white_and_of_its_variance():
    noisy = pixels_of(manifold(noise=0.02))
    noise = noisy - pixels_of(manifold())  # [40, 192]
    assert np.mean(noise**2) == pytest.approx(4e-4, rel=5 * np.sqrt(2 / noise.size))
    assert abs(noise.mean()) < 5 * 0.02 / np.sqrt(noise.size)
    between = np.corrcoef(noise)[np.triu_indices(40, 1)]
    assert np.abs(between).max() < 5 / np.sqrt(192)  # images share none of it
    np.testing.assert_array_equal(pixels_of(manifold(noise=0.02)), noisy)  # added once for all


def test_a_mean_image_in_blocks_that_do_not_divide_the_rows():
    images = manifold("network")
    expected = np.float64(images.train).mean(0)
    np.testing.assert_allclose(data.mean_image(images.train, block=7), expected, atol=1e-6)


def test_a_mean_image_holds_no_more_than_a_block_of_pixels():
    """All of them were held at once: 32 GB of the faces at 128 px, to find a mean."""
    rows = jax.ShapeDtypeStruct((20_000, 1000), np.uint8)
    compiled = jax.jit(data.mean_image).lower(rows).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * 256 * 1000 * 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "sphere"}, "data.name='sphere' must be one of 'rendered', 'linear', 'network'"),
        ({"rank": 0}, r"r=0 \(data.rank, or of data.ranks\) must be an integer in 1..12"),
        ({"rank": 13}, r"r=13 \(data.rank"),
        ({"resolution": 7}, r"data.resolution=7 must be at least 8"),
        ({"noise": 0.1}, r"data.noise=0.1 needs the 40 images of 192 pixels stored"),
    ],
)
def test_manifolds_that_cannot_be_are_told(changes, message, monkeypatch):
    if "noise" in changes:
        monkeypatch.setattr(sets, "STORED_BYTES", 40 * 192 * 4 - 1)
    with pytest.raises(InputError, match=message):
        manifold(**changes)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("celeb_a", "data.name='celeb_a' was not found in data.dir="),
        ("folder", "data.folder='/nowhere/at/all' is not a folder"),
    ],
)
def test_photographs_that_are_not_there_are_one_sentence(tmp_path, name, message):
    with pytest.raises(InputError, match=message) as error:
        data.load(name, str(tmp_path), folder="/nowhere/at/all")
    assert "\n" not in str(error.value)


def test_a_folder_of_photographs_is_loaded_at_its_resolution(tmp_path):
    """Grey levels tell the files apart; one file is no image."""
    from PIL import Image

    levels = list(range(0, 240, 12))
    for level in levels:
        Image.new("RGB", (20, 16), (level,) * 3).save(tmp_path / f"{level}.png")
    options = {"resolution": 8, "folder": str(tmp_path)}
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"broken\.png.*data\.bad='skip'"):
        data.load("folder", str(tmp_path / "cache"), **options)
    with pytest.warns(UserWarning, match=r"Skipped: 1 of 21 files.*broken\.png"):
        images = data.load("folder", str(tmp_path / "cache"), bad="skip", **options)
    assert images.image_shape == (8, 8, 3)
    rows = np.concatenate([images.train, images.test])
    assert (rows.dtype, rows.shape) == (np.uint8, (20, 192))
    assert sorted(rows[:, 0]) == levels
    np.testing.assert_allclose(images.decode(images.test), images.test / 255, atol=1e-6)


# ---------------------------------------------------------------- what the data are


def _images(train, test, **options):
    return data.ImageSet("mine", train, test, (2, 3, 1), **options)


def test_a_fingerprint_changes_with_any_byte_of_any_image():
    rng = np.random.default_rng(0)
    train, test = rng.integers(0, 256, (5, 6), np.uint8), rng.integers(0, 256, (4, 6), np.uint8)
    whole = _images(train, test).fingerprint
    assert whole == _images(train.copy(), test.copy()).fingerprint
    assert (whole["name"], whole["training images"], whole["test images"]) == ("mine", 5, 4)
    seen = {whole["sha256"]}
    for split in (0, 1):
        for at in np.ndindex((train, test)[split].shape):
            changed = [train.copy(), test.copy()]
            changed[split][at] ^= 1
            seen.add(_images(*changed).fingerprint["sha256"])
    assert len(seen) == 1 + train.size + test.size
    moved = _images(np.concatenate([train, test[:1]]), test[1:]).fingerprint
    assert moved["sha256"] not in seen  # the same images, another split
    assert _images(train.view(np.int8), test).fingerprint["sha256"] not in seen


def test_blocks_hash_as_one_array_and_a_memory_map_as_its_content(tmp_path, monkeypatch):
    rows = np.random.default_rng(0).random((100, 7))
    np.save(tmp_path / "rows.npy", rows)
    whole = digests.of_array(rows)
    assert digests.of_array(np.load(tmp_path / "rows.npy", mmap_mode="r")) == whole
    monkeypatch.setattr(digests, "_BLOCK", 7 * 8 * 30)
    blocks = [hashlib.sha256(rows[i : i + 30]).hexdigest() for i in (0, 30, 60, 90)]
    assert digests.of_array(rows) == digests.of_plain(["float64", [100, 7], blocks]) != whole
    assert digests.of_array(rows[:0]) == digests.of_plain(["float64", [0, 7], []])


@pytest.mark.parametrize("name", data.MANIFOLDS)
def test_drawn_images_are_told_by_what_they_are_drawn_from(name, monkeypatch):
    """Not by their pixels, whose last bits are a machine's, nor by how they are kept."""
    stored = manifold(name).fingerprint
    if name == "linear":
        assert manifold(name, noise=0.01).fingerprint["sha256"] != stored["sha256"]
    monkeypatch.setattr(sets, "STORED_BYTES", 0)
    assert manifold(name).fingerprint == stored
    changes = {"rank": 2, "resolution": 9, "train_size": 31, "test_size": 11, "seed": 6}
    for field, value in changes.items():
        assert manifold(name, **{field: value}).fingerprint["sha256"] != stored["sha256"], field


def test_a_folders_fingerprint_is_of_its_images_and_not_of_its_place(tmp_path):
    from PIL import Image

    def of(folder):
        options = {"resolution": 8, "folder": str(folder), "bad": "refuse"}
        return data.load("folder", str(tmp_path / "cache"), **options).fingerprint

    one = tmp_path / "one"
    one.mkdir()
    for level in range(0, 240, 24):
        Image.new("RGB", (20, 16), (level,) * 3).save(one / f"{level}.png")
    first = of(one)
    shutil.copytree(one, tmp_path / "two")
    assert of(tmp_path / "two") == first
    Image.new("RGB", (20, 16), (1, 2, 3)).save(tmp_path / "two" / "0.png")
    altered = of(tmp_path / "two")
    assert altered["sha256"] != first["sha256"]
    assert {k: v for k, v in altered.items() if k != "sha256"} == {
        k: v for k, v in first.items() if k != "sha256"
    }
    Image.new("RGB", (20, 16), (1, 2, 3)).save(one / "more.png")
    more = of(one)
    assert more["training images"] + more["test images"] == 11
    assert more["sha256"] != first["sha256"]


@pytest.mark.parametrize("folder", ["", "  "])
def test_no_folder_is_not_the_current_one(tmp_path, folder):
    with pytest.raises(InputError, match=r"data\.folder='' names no folder"):
        data.load("folder", str(tmp_path), folder=folder)


@pytest.mark.parametrize("name", data.MANIFOLDS)
def test_what_is_drawn_is_not_looked_for_on_disk(tmp_path, name):
    with pytest.raises(InputError, match=f"data.name='{name}' is drawn and not read"):
        data.load(name, str(tmp_path))


def test_data_without_permission_are_one_sentence(mnist_files, monkeypatch):
    root, _ = mnist_files
    path = root / idx.IMAGE_FILES["train"]

    def refuse(file):
        raise PermissionError(13, "Permission denied", str(file))

    monkeypatch.setattr("pathlib.Path.read_bytes", refuse)
    with pytest.raises(InputError) as error:
        data.load("mnist", str(root))
    assert str(error.value) == (
        f"data.name='mnist': {path} cannot be read (Permission denied): mend its permissions, or "
        "the disk."
    )
