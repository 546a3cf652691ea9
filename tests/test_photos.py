import errno
import io
import json
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from vaebal.data import photos
from vaebal.errors import InputError

SIZES = {"train": 23, "validation": 5, "test": 7}


def _scene(seed, height, width):
    """A smooth colour image, [height, width, 3] uint8."""
    phase, rate = np.random.default_rng(seed).uniform(1, 7, (2, 3))
    y, x = np.mgrid[:height, :width] / 40
    waves = np.sin(y[..., None] * rate + phase) * np.cos(x[..., None] * rate[::-1])
    return (127.5 + 127.5 * waves).astype(np.uint8)


def _encoded(pixels, format, **options):
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format, **options)
    return out.getvalue()


def _prepare_celeba(root):
    """TFDS's own files of a small celeb_a: its features, PNG instead of JPEG to be exact."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.datasets.celeb_a import celeb_a_dataset_builder as stock

    class CelebA(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # a name taken
        name = "celeb_a"
        VERSION = tfds.core.Version("2.1.0")

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(218, 178, 3), encoding_format="png"),
                "landmarks": dict.fromkeys(stock.LANDMARK_HEADINGS, np.int64),
                "attributes": dict.fromkeys(stock.ATTR_HEADINGS, np.bool_),
                "identity": {"Identity_No": np.int64},
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(split) for split in SIZES}

        def _generate_examples(self, split):
            for index in range(SIZES[split]):
                pixels = _scene((len(split), index), 218, 178)
                yield (
                    index,
                    {
                        "image": io.BytesIO(_encoded(pixels, "PNG")),
                        "landmarks": dict.fromkeys(stock.LANDMARK_HEADINGS, index),
                        "attributes": dict.fromkeys(stock.ATTR_HEADINGS, True),
                        "identity": {"Identity_No": index},
                    },
                )

    CelebA(data_dir=root, file_format="array_record").download_and_prepare()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    root = tmp_path_factory.mktemp("tfds")
    _prepare_celeba(root)
    return root


@pytest.fixture
def celeba_root(prepared, tmp_path):
    """A data directory of the test's own with the prepared set in it."""
    (tmp_path / "celeb_a").symlink_to(prepared / "celeb_a")
    return tmp_path


def _rows(images):
    """Any order of images -> their flattened bytes, sorted."""
    return sorted(np.asarray(image).tobytes() for image in images)


def test_celeba_is_the_centre_of_every_image_of_each_split(celeba_root):
    splits, _ = photos.celeba(celeba_root, 128)
    assert list(splits) == list(SIZES)
    for split, size in SIZES.items():
        rows = splits[split]
        assert (rows.shape, rows.dtype) == ((size, 128 * 128 * 3), np.uint8)
        assert isinstance(rows, np.memmap)
        scenes = [_scene((len(split), i), 218, 178) for i in range(size)]
        assert _rows(rows) == _rows(scene[45:173, 25:153] for scene in scenes)
        # As much is cut from the top as from the bottom, from the left as from the right.
        assert (218 - 173, 178 - 153) == (45, 25)


@pytest.mark.parametrize("resolution", [64, 32, 1])
def test_smaller_celeba_is_the_mean_over_blocks_of_the_same_crop(celeba_root, resolution):
    rows = photos.celeba(celeba_root, resolution).splits["test"]
    block = 128 // resolution
    means = []
    for index in range(SIZES["test"]):
        crop = _scene((4, index), 218, 178)[45:173, 25:153]
        blocks = crop.reshape(resolution, block, resolution, block, 3)
        means.append(np.floor(blocks.mean((1, 3)) + 0.5).astype(np.uint8))
    assert _rows(rows) == _rows(means)


def test_celeba_is_prepared_once_and_then_needs_no_source(celeba_root, capsys):
    first = photos.celeba(celeba_root, 16)
    assert "Preparing 35 images once" in capsys.readouterr().err
    (celeba_root / "celeb_a").unlink()
    again = photos.celeba(celeba_root, 16)
    assert capsys.readouterr().err == ""
    for split in SIZES:
        np.testing.assert_array_equal(again.splits[split], first.splits[split])
    # Nothing half-written stays.
    held = {path.name for path in (celeba_root / "vaebal_cache").iterdir()}
    npys = {f"celeba_16_{split}.npy" for split in SIZES}
    assert held == npys | {"celeba_16.json", "celeba_16.lock"}


def test_two_at_once_prepare_once(celeba_root, capsys):
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(lambda _: photos.celeba(celeba_root, 8), range(2))
    assert capsys.readouterr().err.count("Preparing") == 1
    assert one.provenance == other.provenance


def test_provenance_says_what_and_how(celeba_root):
    _, said = photos.celeba(celeba_root, 64)
    assert said == json.loads((celeba_root / "vaebal_cache/celeba_64.json").read_text())
    assert said["crop"] == {"rows": [45, 173], "columns": [25, 153]}
    assert said["filter"] == "mean over 2x2 pixels, half up"
    assert said["source"]["version"] == "2.1.0"
    assert {split: held["shape"] for split, held in said["splits"].items()} == {
        split: [size, 64 * 64 * 3] for split, size in SIZES.items()
    }


def _truncate(file):
    file.write_bytes(file.read_bytes()[:-1000])


def _zero(file):
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize(
    "damage", [_truncate, _zero, lambda f: f.unlink(), lambda f: f.write_bytes(b"")]
)
def test_a_damaged_cache_is_named_and_made_anew(celeba_root, damage, split):
    before = {name: rows.copy() for name, rows in photos.celeba(celeba_root, 8).splits.items()}
    file = celeba_root / "vaebal_cache" / f"celeba_8_{split}.npy"
    damage(file)
    with pytest.warns(UserWarning, match=f"{file.name} is damaged .* prepared again"):
        after = photos.celeba(celeba_root, 8).splits
    for name in SIZES:
        np.testing.assert_array_equal(after[name], before[name])


def test_a_single_changed_byte_anywhere_in_a_cache_is_seen(celeba_root):
    file = celeba_root / "vaebal_cache" / "celeba_8_train.npy"
    before = photos.celeba(celeba_root, 8).splits["train"].copy()
    for row in (0, 10, 22):
        content = bytearray(file.read_bytes())
        content[len(content) - before.nbytes + row * before.shape[1] + 5] ^= 1
        file.write_bytes(content)
        with pytest.warns(UserWarning, match="celeba_8_train.npy is damaged"):
            after = photos.celeba(celeba_root, 8).splits["train"]
        np.testing.assert_array_equal(after, before)


def test_a_cache_of_which_fewer_bytes_were_hashed_is_made_anew_unsaid(celeba_root):
    photos.celeba(celeba_root, 8)
    listing = celeba_root / "vaebal_cache/celeba_8.json"
    whole = json.loads(listing.read_text())
    older = {key: value for key, value in whole.items() if key != "digests"}
    older["splits"] = {split: {"sha256_of_64_rows": "0"} for split in SIZES}
    listing.write_text(json.dumps(older))
    photos.celeba(celeba_root, 8)
    assert json.loads(listing.read_text()) == whole


@pytest.mark.parametrize("name", ["celeba_8.json", "celeba_8_train.npy"])
def test_a_cache_that_cannot_be_read_is_not_called_damaged(celeba_root, monkeypatch, name):
    photos.celeba(celeba_root, 8)
    file = celeba_root / "vaebal_cache" / name
    before, opened = file.read_bytes(), io.open

    def refuse(path, *arguments, **options):
        if str(path) == str(file):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", refuse)
        patch.setattr("io.open", refuse)
        with pytest.raises(InputError) as error:
            photos.celeba(celeba_root, 8)
    assert str(error.value) == (
        f"data.dir: {file} cannot be read (Permission denied): mend its permissions, or the disk."
    )
    assert file.read_bytes() == before


def test_a_damaged_listing_is_named_and_made_anew(celeba_root):
    photos.celeba(celeba_root, 8)
    listing = celeba_root / "vaebal_cache/celeba_8.json"
    whole = listing.read_text()
    listing.write_text(whole[:40])
    with pytest.warns(UserWarning, match=r"celeba_8.json is damaged: it is prepared again"):
        photos.celeba(celeba_root, 8)
    assert listing.read_text() == whole


def test_a_cache_of_another_source_is_made_anew(celeba_root):
    photos.celeba(celeba_root, 8)
    listing = celeba_root / "vaebal_cache/celeba_8.json"
    whole = listing.read_text()
    other = json.loads(whole)
    other["source"]["sha256_of_files"] = "0"
    listing.write_text(json.dumps(other))
    photos.celeba(celeba_root, 8)
    assert listing.read_text() == whole


def test_celeba_damaged_and_without_its_source_says_both(celeba_root):
    photos.celeba(celeba_root, 8)
    (celeba_root / "celeb_a").unlink()
    _truncate(celeba_root / "vaebal_cache/celeba_8_train.npy")
    with (
        pytest.warns(UserWarning, match="celeba_8_train.npy is damaged"),
        pytest.raises(InputError, match=r"data.name='celeb_a' was not found in data.dir="),
    ):
        photos.celeba(celeba_root, 8)


def test_a_damaged_record_file_is_an_input_error(prepared, tmp_path):
    copy = tmp_path / "celeb_a/2.1.0"
    copy.mkdir(parents=True)
    for file in (prepared / "celeb_a/2.1.0").iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    shard = next(copy.glob("*train.array_record*"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
    shard.write_bytes(content)
    with pytest.raises(InputError, match=r"could not be read .*prepare it again"):
        photos.celeba(tmp_path, 8)
    assert not list((tmp_path / "vaebal_cache").glob("*.npy*"))


@pytest.mark.parametrize("resolution", [0, -1, 48, 256])
def test_celeba_at_other_resolutions_is_refused(tmp_path, resolution):
    with pytest.raises(InputError, match=f"data.resolution={resolution} is no divisor of 128"):
        photos.celeba(tmp_path, resolution)


def test_too_little_space_is_said_before_anything_is_written(celeba_root, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 100}))
    with pytest.raises(InputError, match=r"0.0 GB free and 0.0 GB are needed"):
        photos.celeba(celeba_root, 8)
    assert not list((celeba_root / "vaebal_cache").glob("*.npy*"))


def test_a_disk_that_fills_up_is_said_and_nothing_half_written_stays(celeba_root, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(
        InputError, match=r"cannot be written \(No space left on device\): make space"
    ):
        photos.celeba(celeba_root, 8)
    assert [f.name for f in (celeba_root / "vaebal_cache").iterdir()] == ["celeba_8.lock"]


def test_a_place_that_cannot_be_written_is_named(celeba_root):
    (celeba_root / "vaebal_cache").write_text("a file, no folder")
    with pytest.raises(InputError, match=r"vaebal_cache cannot be written \(File exists\)"):
        photos.celeba(celeba_root, 8)


@pytest.fixture
def images(tmp_path):
    """40 images of mixed sizes in nested folders; [relative path -> pixels] of the lossless."""
    rng = np.random.default_rng(0)
    path, lossless = tmp_path / "mine", {}
    for index in range(40):
        height, width = rng.integers(20, 60, 2)
        suffix = ("png", "bmp", "webp", "jpg")[index % 4]
        name = f"{'ab'[index % 2]}/{index:02}.{suffix}"
        pixels = _scene(index, height, width)
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        options = {"lossless": True} if suffix == "webp" else {}
        format = {"jpg": "JPEG"}.get(suffix, suffix.upper())
        (path / name).write_bytes(_encoded(pixels, format, **options))
        if suffix != "jpg":
            lossless[name] = pixels
    return path, lossless


def _names(path):
    return sorted(file.relative_to(path).as_posix() for file in path.rglob("*.*"))


def _by_name(path, splits):
    """{relative path: row} of both splits, each in the order of the paths."""
    test = photos.held_out(_names(path))
    train = [name for name in _names(path) if name not in test]
    return dict(zip(train, splits["train"], strict=True)) | dict(
        zip(sorted(test), splits["test"], strict=True)
    )


def test_a_folder_is_centre_squares_by_lanczos(images, tmp_path):
    path, lossless = images
    rows = _by_name(path, photos.folder(path, 16, tmp_path, bad="refuse").splits)
    assert len(rows) == 40
    for name, pixels in lossless.items():
        height, width, _ = pixels.shape
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        cut = Image.fromarray(pixels[top : top + side, left : left + side])
        expected = np.asarray(cut.resize((16, 16), Image.Resampling.LANCZOS))
        np.testing.assert_array_equal(rows[name].reshape(16, 16, 3), expected)


def test_an_image_of_the_resolution_is_left_as_it_is(tmp_path):
    pixels = _scene(0, 24, 30)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    np.testing.assert_array_equal(photos.square(tmp_path / "a.png", 24), pixels[:, 3:27])


def test_exif_orientation_is_applied(tmp_path):
    """Orientation 6 is shown turned a quarter clockwise."""
    pixels = _scene(1, 24, 24)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(photos.square(tmp_path / "a.png", 24), np.rot90(pixels, -1))


def test_transparency_is_composited_on_white(tmp_path):
    pixels, alpha = _scene(2, 24, 24), np.zeros((24, 24), np.uint8)
    alpha[:, 8:], alpha[:, 16:] = 128, 255
    Image.fromarray(np.dstack([pixels, alpha])).save(tmp_path / "a.png")
    weight = alpha[..., None] / 255
    expected = weight * pixels + (1 - weight) * 255
    assert np.abs(photos.square(tmp_path / "a.png", 24) - expected).max() <= 1


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "1"])
def test_other_modes_become_rgb(tmp_path, mode):
    image = Image.fromarray(_scene(3, 24, 24)).convert(mode)
    suffix = "jpg" if mode == "CMYK" else "png"
    image.save(tmp_path / f"a.{suffix}")
    with Image.open(tmp_path / f"a.{suffix}") as stored:
        expected = np.asarray(stored.convert("RGB"))
    np.testing.assert_array_equal(photos.square(tmp_path / f"a.{suffix}", 24), expected)


def _text(path):
    (path / "notes.txt").write_text("not an image")


def _truncated(path):
    content = _encoded(_scene(0, 200, 200), "JPEG")
    (path / "cut.jpg").write_bytes(content[: len(content) // 2])


def _small(path):
    (path / "small.png").write_bytes(_encoded(_scene(0, 40, 15), "PNG"))


def _deep(path):
    grey = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    (path / "deep.png").write_bytes(_encoded(grey, "PNG"))


def _gif(path):
    (path / "moving.gif").write_bytes(_encoded(_scene(0, 40, 40), "GIF"))


@pytest.mark.parametrize(
    ("add", "said"),
    [
        (_text, r"notes.txt \(no image of the formats JPEG, PNG, WEBP, BMP\)"),
        (_truncated, r"cut.jpg \(.*truncated.*\)"),
        (_small, r"small.png \(15x40 pixels, smaller than 16x16\)"),
        (_deep, r"deep.png \(more than 8 bits of grey\)"),
        (_gif, r"moving.gif \(no image of"),
        (lambda path: (path / "empty.png").touch(), r"empty.png \(no image of"),
    ],
)
def test_a_bad_file_is_named_and_refused_or_skipped(images, tmp_path, add, said):
    path, _ = images
    clean = _by_name(path, photos.folder(path, 16, tmp_path, bad="refuse").splits)
    add(path)
    for _ in range(2):  # prepared, then from the cache
        with pytest.raises(InputError, match=f"1 of 41 files in .* cannot be used: {said}"):
            photos.folder(path, 16, tmp_path, bad="refuse")
    with pytest.warns(UserWarning, match=f"Skipped: 1 of 41 files in .*: {said}"):
        splits, provenance = photos.folder(path, 16, tmp_path, bad="skip")
    (skipped,) = provenance["skipped"]
    (path / skipped).unlink()
    got = _by_name(path, splits)
    assert sorted(got) == sorted(clean)
    assert all((got[name] == clean[name]).all() for name in clean)


def test_many_bad_files_are_counted_and_all_recorded(images, tmp_path):
    path, _ = images
    for index in range(9):
        (path / f"{index}.jpg").write_bytes(b"no")
    with pytest.raises(InputError, match=r"9 of 49 files .* 0.jpg .* 4.jpg .*\) and 4 more; rep"):
        photos.folder(path, 16, tmp_path, bad="refuse")
    with pytest.warns(UserWarning, match="9 of 49"):
        _, provenance = photos.folder(path, 16, tmp_path, bad="skip")
    assert sorted(provenance["skipped"]) == [f"{index}.jpg" for index in range(9)]


def test_the_folder_is_prepared_again_only_where_it_changed(images, tmp_path, capsys):
    path, _ = images
    for _ in range(2):
        photos.folder(path, 16, tmp_path, bad="refuse")
    assert capsys.readouterr().err.count("Preparing 40 images") == 1
    (path / "a/00.png").write_bytes(_encoded(np.zeros((20, 20, 3), np.uint8), "PNG"))
    rows = _by_name(path, photos.folder(path, 16, tmp_path, bad="refuse").splits)
    assert not rows["a/00.png"].any()
    assert capsys.readouterr().err.count("Preparing 40 images") == 1
    photos.folder(path, 8, tmp_path, bad="refuse")  # beside the other, which stays
    photos.folder(path, 16, tmp_path, bad="refuse")
    assert capsys.readouterr().err.count("Preparing 40 images") == 1


def test_hidden_files_and_the_cache_itself_are_no_images(images):
    path, _ = images
    (path / ".DS_Store").write_text("x")
    (path / ".thumbnails").mkdir()
    (path / ".thumbnails/a.png").write_text("x")
    for _ in range(2):
        splits, provenance = photos.folder(path, 16, path, bad="refuse")
        assert sum(map(len, splits.values())) == 40
        assert provenance["skipped"] == {}


def test_the_test_split_is_a_tenth_and_stays_when_files_are_added():
    names = [f"{folder}/{index}.jpg" for folder in "abc" for index in range(1000)]
    test = photos.held_out(names)
    assert abs(len(test) - 300) < 4 * np.sqrt(3000 * 0.1 * 0.9)
    assert photos.held_out(reversed(names)) == test
    for count in range(3000, 0, -7):
        assert photos.held_out([*test, *names[:count]]) == test
    assert photos.held_out([*names, "new/0.jpg", "new/1.jpg"]) - {"new/0.jpg", "new/1.jpg"} == test


def test_neither_split_is_ever_empty():
    names = [f"{index}.png" for index in range(200)]
    low = sorted(photos.held_out(names))
    high = [name for name in names if name not in low]
    for few in (low, high, low[:2], high[:2]):
        assert 1 <= len(photos.held_out(few)) < len(few)


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_images_are_refused(tmp_path, count):
    (tmp_path / "mine").mkdir()
    for index in range(count):
        (tmp_path / f"mine/{index}.png").write_bytes(_encoded(_scene(0, 20, 20), "PNG"))
    with pytest.raises(InputError, match=f"mine' holds {count} files: at least two images"):
        photos.folder(tmp_path / "mine", 16, tmp_path, bad="refuse")


@pytest.mark.parametrize("bad", ["refuse", "skip"])
def test_a_folder_of_bad_files_only_is_refused(tmp_path, bad):
    (tmp_path / "mine").mkdir()
    for index in range(3):
        (tmp_path / f"mine/{index}.png").touch()
    with pytest.raises(InputError, match=r"mine has no usable image for its split 'train': .*png"):
        photos.folder(tmp_path / "mine", 16, tmp_path, bad=bad)
    assert not list((tmp_path / "vaebal_cache").glob("*.npy*"))


@pytest.mark.parametrize(
    ("path", "resolution", "bad", "said"),
    [
        ("", 16, "ignore", "data.bad='ignore' must be 'refuse' or 'skip'"),
        ("", 0, "skip", "data.resolution=0 must be positive"),
        ("absent", 16, "skip", "absent' is not a folder"),
    ],
)
def test_bad_folder_arguments_are_named(tmp_path, path, resolution, bad, said):
    with pytest.raises(InputError, match=said):
        photos.folder(tmp_path / path, resolution, tmp_path, bad=bad)


# ---------------------------------------------------------------- what cannot be entered


def _scandir_that_refuses(folder):
    """`os.scandir`, without the permission for one folder: the tests may run as root."""
    scandir = os.scandir

    def refuse(path):
        if str(path) == str(folder):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    return refuse


def _left_out(images, monkeypatch):
    """The folder `images` with five things in it that are no files, and why not."""
    path, _ = images
    (path / "locked").mkdir()
    Image.new("RGB", (20, 20)).save(path / "locked" / "x.png")
    (path / "album").symlink_to(path / "a")
    (path / "round").symlink_to(path)
    (path / "gone.png").symlink_to(path / "nowhere.png")
    os.mkfifo(path / "pipe")
    (path / ".hidden").symlink_to(path / "nowhere.png")
    monkeypatch.setattr(os, "scandir", _scandir_that_refuses(path / "locked"))
    return {
        "album": "a link to a folder",
        "gone.png": "a broken link",
        "locked": "a folder that cannot be read: Permission denied",
        "pipe": "neither a file nor a folder",
        "round": "a link to a folder",
    }


def test_what_cannot_be_entered_is_refused_by_name(images, tmp_path, monkeypatch):
    why = _left_out(images, monkeypatch)
    with pytest.raises(InputError) as error:
        photos.folder(images[0], 16, tmp_path, bad="refuse")
    named = ", ".join(f"{name} ({reason})" for name, reason in why.items())
    assert str(error.value) == (
        f"5 of 45 files in {images[0]} cannot be used: {named}; repair or remove them, or set "
        "data.bad='skip'."
    )
    assert not (tmp_path / "vaebal_cache").exists()  # before any work


def test_what_cannot_be_entered_is_skipped_by_name(images, tmp_path, monkeypatch):
    whole = photos.folder(images[0], 16, tmp_path, bad="refuse").splits
    why = _left_out(images, monkeypatch)
    for _ in range(2):  # prepared, and found prepared
        with pytest.warns(
            UserWarning, match=r"Skipped: 5 of 45 files .*album \(a link to a folder"
        ):
            splits, provenance = photos.folder(images[0], 16, tmp_path, bad="skip")
        assert provenance["skipped"] == why
        for split in ("train", "test"):
            np.testing.assert_array_equal(splits[split], whole[split])


def test_a_folder_that_cannot_be_read_at_all_is_named(images, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "scandir", _scandir_that_refuses(images[0]))
    for bad in ("refuse", "skip"):
        with pytest.raises(InputError, match=r"mine' cannot be read \(Permission denied\): mend"):
            photos.folder(images[0], 16, tmp_path, bad=bad)


def test_a_file_without_permission_is_named_and_used_once_it_has_it(images, tmp_path, monkeypatch):
    """Though its size and time are the same then: no cache holds that it could not be read."""
    path, locked = images[0], images[0] / "a" / "00.png"
    whole = photos.folder(path, 16, tmp_path / "whole", bad="refuse").splits
    access = os.access
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda file, mode: file != locked and access(file, mode))
        with pytest.raises(
            InputError, match=r"1 of 40 files .*: a/00\.png \(Permission denied\); "
        ):
            photos.folder(path, 16, tmp_path, bad="refuse")
        with pytest.warns(UserWarning, match=r"1 of 40 files .*: a/00\.png \(Permission denied\)"):
            some = photos.folder(path, 16, tmp_path, bad="skip").splits
    assert sum(map(len, some.values())) == 39
    after = photos.folder(path, 16, tmp_path, bad="refuse").splits
    for split in ("train", "test"):
        np.testing.assert_array_equal(after[split], whole[split])


def test_a_disk_that_fails_to_give_a_file_is_not_an_unusable_image(images, tmp_path, monkeypatch):
    def fail(file, resolution):
        raise OSError(errno.EIO, "Input/output error", str(file))

    monkeypatch.setattr(photos, "square", fail)
    for bad in ("refuse", "skip"):
        with pytest.raises(InputError, match=r"\.\w+ cannot be read \(Input/output error\): mend"):
            photos.folder(images[0], 16, tmp_path, bad=bad)
    assert [file.suffix for file in (tmp_path / "vaebal_cache").iterdir()] == [".lock"]


@pytest.mark.parametrize("format", ["webp", "png"])
def test_an_animation_is_no_photograph(tmp_path, format):
    frames = [Image.fromarray(_scene(index, 20, 20)) for index in range(3)]
    file = tmp_path / f"moving.{format}"
    frames[0].save(file, save_all=True, append_images=frames[1:])
    with pytest.raises(ValueError, match="an animation of 3 frames"):
        photos.square(file, 16)
    frames[0].save(file)
    assert photos.square(file, 16).shape == (16, 16, 3)


def test_a_jpeg_with_a_second_picture_is_a_photograph(tmp_path):
    """As cameras add previews: the first is what every viewer shows."""
    pictures = [Image.new("RGB", (24, 24), (level, 0, 0)) for level in (200, 20)]
    pictures[0].save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=pictures[1:])
    np.testing.assert_allclose(photos.square(tmp_path / "a.jpg", 16)[..., 0], 200, atol=3)
