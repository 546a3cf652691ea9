import hashlib
import io
import pickle
import urllib.error
import zipfile
from typing import NamedTuple

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from vaebal.errors import InputError
from vaebal.measures import inception, inception_weights

RNG_IMAGES = np.random.default_rng(0).integers(0, 256, (2, 299, 299, 3), np.uint8)


# Preprocessing


def _tf1_resize(image):
    """The rule of TF1's resize_bilinear, pixel by pixel: [H, W, C] -> [299, 299, C] in float64."""
    height, width, channels = image.shape
    out = np.empty((299, 299, channels))
    for i in range(299):
        y = i * height / 299
        top, bottom = int(y), min(int(y) + 1, height - 1)
        for j in range(299):
            x = j * width / 299
            left, right = int(x), min(int(x) + 1, width - 1)
            upper = image[top, left] + (x - left) * (image[top, right] - image[top, left])
            lower = image[bottom, left] + (x - left) * (image[bottom, right] - image[bottom, left])
            out[i, j] = upper + (y - top) * (lower - upper)
    return out


@pytest.mark.parametrize("shape", [(28, 64, 3), (350, 128, 1)])
def test_resize_is_tf1s(shape):
    image = np.random.default_rng(1).integers(0, 256, shape, np.uint8)
    expected = (_tf1_resize(image.astype(float)) - 128) / 128
    got = inception.preprocess(image[None])[0]
    np.testing.assert_allclose(got, np.broadcast_to(expected, (299, 299, 3)), atol=1e-4)


def test_resize_to_the_same_and_to_half_the_size_picks_pixels():
    """Half-pixel centres or antialiasing would average neighbours at half the size."""
    pixels = (RNG_IMAGES.astype(np.float32) - 128) / 128
    np.testing.assert_array_equal(inception.preprocess(RNG_IMAGES), pixels)
    double = RNG_IMAGES.repeat(2, 1).repeat(2, 2)
    double[:, 1::2] = 0
    double[:, :, 1::2] = 0
    np.testing.assert_array_equal(inception.preprocess(double), pixels)


def test_floats_are_clipped_and_rounded_half_to_even():
    values = np.array([-0.3, 0.0, 0.1, 0.3, 0.5, 0.999, 1.0, 1.2], np.float32)
    # 255 * .1, .3 and .5 are 25.5, 76.5 and 127.5 in float32: ties.
    as_bytes = np.array([0, 0, 26, 76, 128, 255, 255, 255], np.uint8)
    images = [v[:, None, None, None] * np.ones((1, 4, 4, 3), v.dtype) for v in (values, as_bytes)]
    np.testing.assert_array_equal(*map(inception.preprocess, images))


def test_grey_is_three_equal_channels():
    grey = RNG_IMAGES[..., :1]
    np.testing.assert_array_equal(
        inception.preprocess(grey), inception.preprocess(grey.repeat(3, -1))
    )


# The network


def test_average_pool_counts_pixels_that_exist():
    x = np.random.default_rng(2).normal(size=(1, 5, 4, 2)).astype(np.float32)
    expected = np.empty_like(x)
    for i in range(5):
        for j in range(4):
            window = x[:, max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2]
            expected[:, i, j] = window.mean((1, 2))
    np.testing.assert_allclose(inception.average_pool(x), expected, atol=1e-6)


def test_size_is_that_of_the_published_network():
    """Keras counts 23,851,784: 1000 classes, and three numbers a channel of batch norm."""
    shapes = inception.parameter_shapes()
    channels = sum(shape[-1] for name, shape in shapes.items() if name.endswith("bias")) - 1008
    convolutions = 23_851_784 - 2049 * 1000 - 3 * channels
    assert sum(map(np.prod, shapes.values())) == convolutions + channels + 2049 * 1008
    assert len(shapes) == 2 * 94 + 2
    assert shapes["fc/kernel"] == (2048, 1008)


class Layer(NamedTuple):
    """Convolution without bias, batch norm, rectifier."""

    name: str
    channels: int
    size: tuple[int, int] = (1, 1)
    stride: int = 1
    padded: bool = True


def _halving(name, channels):
    return Layer(name, channels, (3, 3), stride=2, padded=False)


def _mixed_5(pool_features):
    return [
        [Layer("branch1x1", 64)],
        [Layer("branch5x5_1", 48), Layer("branch5x5_2", 64, (5, 5))],
        [
            Layer("branch3x3dbl_1", 64),
            Layer("branch3x3dbl_2", 96, (3, 3)),
            Layer("branch3x3dbl_3", 96, (3, 3)),
        ],
        ["mean", Layer("branch_pool", pool_features)],
    ]


def _mixed_6(width):
    return [
        [Layer("branch1x1", 192)],
        [
            Layer("branch7x7_1", width),
            Layer("branch7x7_2", width, (1, 7)),
            Layer("branch7x7_3", 192, (7, 1)),
        ],
        [
            Layer("branch7x7dbl_1", width),
            Layer("branch7x7dbl_2", width, (7, 1)),
            Layer("branch7x7dbl_3", width, (1, 7)),
            Layer("branch7x7dbl_4", width, (7, 1)),
            Layer("branch7x7dbl_5", 192, (1, 7)),
        ],
        ["mean", Layer("branch_pool", 192)],
    ]


def _mixed_7(pool):
    def fork(name):
        return "", [[Layer(name + "a", 384, (1, 3))], [Layer(name + "b", 384, (3, 1))]]

    return [
        [Layer("branch1x1", 320)],
        [Layer("branch3x3_1", 384), fork("branch3x3_2")],
        [
            Layer("branch3x3dbl_1", 448),
            Layer("branch3x3dbl_2", 384, (3, 3)),
            fork("branch3x3dbl_3"),
        ],
        [pool, Layer("branch_pool", 192)],
    ]


# The published network as data: layers and pools in series, (name, branches) side by side.
_NETWORK = [
    _halving("Conv2d_1a_3x3", 32),
    Layer("Conv2d_2a_3x3", 32, (3, 3), padded=False),
    Layer("Conv2d_2b_3x3", 64, (3, 3)),
    "halve",
    "feature",
    Layer("Conv2d_3b_1x1", 80),
    Layer("Conv2d_4a_3x3", 192, (3, 3), padded=False),
    "halve",
    "feature",
    ("Mixed_5b.", _mixed_5(32)),
    ("Mixed_5c.", _mixed_5(64)),
    ("Mixed_5d.", _mixed_5(64)),
    (
        "Mixed_6a.",
        [
            [_halving("branch3x3", 384)],
            [
                Layer("branch3x3dbl_1", 64),
                Layer("branch3x3dbl_2", 96, (3, 3)),
                _halving("branch3x3dbl_3", 96),
            ],
            ["halve"],
        ],
    ),
    ("Mixed_6b.", _mixed_6(128)),
    ("Mixed_6c.", _mixed_6(160)),
    ("Mixed_6d.", _mixed_6(160)),
    ("Mixed_6e.", _mixed_6(192)),
    "feature",
    (
        "Mixed_7a.",
        [
            [Layer("branch3x3_1", 192), _halving("branch3x3_2", 320)],
            [
                Layer("branch7x7x3_1", 192),
                Layer("branch7x7x3_2", 192, (1, 7)),
                Layer("branch7x7x3_3", 192, (7, 1)),
                _halving("branch7x7x3_4", 192),
            ],
            ["halve"],
        ],
    ),
    ("Mixed_7b.", _mixed_7("mean")),
    ("Mixed_7c.", _mixed_7("max")),
    "feature",
]


def _follow(steps, x, backend, features, prefix=""):
    """Runs `steps` on x in the backend's arrays; appends x to `features` where it is asked for."""
    for step in steps:
        if step == "feature":
            features.append(x)
        elif isinstance(step, str):
            x = backend.pool(step, x)
        elif isinstance(step, Layer):
            x = backend.layer(prefix + step.name, step, x)
        else:
            name, branches = step
            x = backend.side_by_side(
                [_follow(b, x, backend, features, prefix + name) for b in branches]
            )
    return x


class _RandomWeights:
    """A state dict of the PyTorch names, drawn as the network is followed.

    Batch norm's statistics are those of the layer's own outputs, so that activations keep
    their size through the depth. Its biases are positive: rectifiers that cut at the mean make
    a random network of this depth chaotic, and float32's rounding grows some 400-fold.
    """

    def __init__(self, seed):
        self.rng, self.state = np.random.default_rng(seed), {}
        self.add("fc.weight", self.rng.normal(0, 2048**-0.5, (1008, 2048)))
        self.add("fc.bias", self.rng.normal(size=1008))

    def add(self, name, value):
        self.state[name] = np.asarray(value, np.float32)
        return self.state[name]

    def draw(self, name, inputs, layer):
        shape = layer.channels, inputs, *layer.size
        weight = self.rng.normal(0, np.prod(shape[1:]) ** -0.5, shape)
        return (
            self.add(f"{name}.conv.weight", weight),
            self.add(f"{name}.bn.weight", np.exp(self.rng.normal(0, 0.3, layer.channels))),
            self.add(f"{name}.bn.bias", self.rng.normal(0.5, 0.3, layer.channels)),
        )


class _InNumPy(_RandomWeights):
    """Float64, NHWC."""

    def layer(self, name, layer, x):
        weight, gain, shift = self.draw(name, x.shape[-1], layer)
        (high, wide), pad = layer.size, [(s // 2 * layer.padded,) * 2 for s in layer.size]
        x = np.pad(x, ((0, 0), *pad, (0, 0)))
        bottom, right = x.shape[1] - high + 1, x.shape[2] - wide + 1
        x = sum(
            x[:, i : i + bottom : layer.stride, j : j + right : layer.stride] @ weight[:, :, i, j].T
            for i in range(high)
            for j in range(wide)
        )
        mean = self.add(f"{name}.bn.running_mean", x.mean((0, 1, 2)))
        variance = self.add(f"{name}.bn.running_var", x.var((0, 1, 2)))
        return np.maximum(gain * (x - mean) / np.sqrt(variance + 0.001) + shift, 0)

    def pool(self, kind, x):
        if kind != "halve":
            x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=np.nan)
        windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), (1, 2))
        if kind == "halve":
            return windows[:, ::2, ::2].max((-2, -1))
        return {"mean": np.nanmean, "max": np.nanmax}[kind](windows, (-2, -1))

    def side_by_side(self, arrays):
        return np.concatenate(arrays, -1)


def _check_features(params, x, features, state):
    """Relative error below 1e-4 at every pool and in the logits; features are NHWC, float64."""
    features[-1] = features[-1].mean((1, 2))
    features.append(features[-1] @ state["fc.weight"].T.astype(float) + state["fc.bias"])
    got = jax.jit(inception.InceptionV3().apply)({"params": params}, x)
    for name, found, expected in zip(got._fields, got, features, strict=True):
        assert found.shape == expected.shape, name
        assert 0.1 < expected.std() < 10, name
        error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
        assert error < 1e-4, name
    return got


def test_features_are_those_of_the_published_network():
    """Against the table above, convolved, normalised and pooled by NumPy in float64."""
    oracle, features = _InNumPy(6), []
    x = np.random.default_rng(7).uniform(-1, 1, (4, 107, 107, 3)).astype(np.float32)
    _follow(_NETWORK, x.astype(float), oracle, features)
    params = inception_weights.params_from_torch(oracle.state, "the oracle")
    _check_features(params, x, features, oracle.state)


@pytest.mark.parametrize("block", [1, 3, 5, 8])
def test_blocks_count_every_image_once(monkeypatch, block):
    """Five images, whatever the block; every call has the same shape, so one compilation."""
    shapes = set()

    def mean(params, images):
        shapes.add(images.shape)
        return params * images.astype(np.float32).mean((1, 2))

    monkeypatch.setattr(inception, "_block_features", mean)
    images = np.random.default_rng(3).integers(0, 256, (5, 4, 4, 3), np.uint8)
    got = inception.inception_features(np.float32(2), images, block)
    np.testing.assert_array_equal(got, 2 * images.astype(np.float32).mean((1, 2)))
    assert shapes == {(block, 4, 4, 3)}


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((2, 64), np.uint8), r"shape \(2, 64\), but must be \[N, H, W, C\]"),
        (np.zeros((2, 8, 8, 4), np.uint8), "C = 1 or 3"),
        (np.zeros((0, 8, 8, 3), np.uint8), "at least one image"),
        (np.zeros((2, 8, 8, 3), np.int32), "type int32: pass uint8, or floats"),
        (np.full((2, 8, 8, 3), 117.0, np.float32), "100.0% of its pixels outside"),
        (np.array([0, np.nan])[:, None, None, None] * np.ones((1, 8, 8, 3)), "finite in image 1"),
    ],
)
def test_other_images_are_refused(images, message):
    with pytest.raises(ValueError, match=message):
        inception.inception_features({}, images, 2)


def test_an_empty_block_is_refused():
    with pytest.raises(ValueError, match="block=0 must be at least 1"):
        inception.inception_features({}, np.zeros((2, 8, 8, 3), np.uint8), 0)


# Weights


def _random_torch_state(seed=0):
    """A state dict of the published names and shapes, as NumPy arrays; 94 convolutions."""
    rng = np.random.default_rng(seed)
    state = {}
    for name, shape in inception.parameter_shapes().items():
        layer = name.removesuffix("/kernel").replace("/", ".")
        if name == "fc/kernel":
            state |= {"fc.weight": np.zeros(shape[::-1]), "fc.bias": np.zeros(1008)}
        elif name.endswith("kernel"):
            height, width, fan_in, out = shape
            # Strides of zero: 24 million numbers would cost seconds and test no more than these.
            row = rng.normal(size=(out, 1, height, width)).astype(np.float32)
            state[f"{layer}.conv.weight"] = np.broadcast_to(row, (out, fan_in, height, width))
            for part in ("weight", "bias", "running_mean", "running_var"):
                state[f"{layer}.bn.{part}"] = rng.uniform(0.5, 2, out).astype(np.float32)
            state[f"{layer}.bn.num_batches_tracked"] = np.zeros((), np.int64)
    return state


def test_folding_is_batch_norm():
    """gain (w x - mean)/sqrt(var + .001) + shift for a 1 x 1 convolution of one pixel."""
    state = _random_torch_state()
    params = flatten_dict(inception_weights.params_from_torch(state, "here"), sep="/")
    shapes = inception.parameter_shapes()
    assert {name: leaf.shape for name, leaf in params.items()} == shapes
    assert {leaf.dtype for leaf in params.values()} == {np.dtype(np.float32)}
    layer, x = "Mixed_6b.branch7x7_1", np.random.default_rng(4).normal(size=768)
    gain, shift, mean, variance = (
        state[f"{layer}.bn.{part}"] for part in ("weight", "bias", "running_mean", "running_var")
    )
    before = state[f"{layer}.conv.weight"][:, :, 0, 0] @ x
    expected = gain * (before - mean) / np.sqrt(variance + 1e-3) + shift
    layer = layer.replace(".", "/")
    got = x @ params[f"{layer}/kernel"][0, 0] + params[f"{layer}/bias"]
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_missing_and_misshaped_tensors_are_named():
    state = _random_torch_state()
    state["Mixed_6a.branch3x3.bn.bias"] = np.zeros(383)
    with pytest.raises(InputError, match=r"Mixed_6a.branch3x3.bn.bias of shape \(383,\), not \(38"):
        inception_weights.params_from_torch(state, "here")
    del state["Mixed_6a.branch3x3.bn.bias"], state["fc.weight"]
    with pytest.raises(
        InputError, match=r"here lacks 2 of 472 tensors .*fc.weight.*; use pt_incep"
    ):
        inception_weights.params_from_torch(state, "here")


# torch.save's formats, written by hand: pickle opcodes, then storages.

_ARRAYS = {
    "a.weight": np.arange(24, dtype="<f4").reshape(2, 3, 4) / 7,
    "a.steps": np.array(5, "<i8"),
    "shared": np.arange(2, 14, dtype="<f4").reshape(4, 3).T / 7,  # transposed, inside a.weight
}


def _tensor(key, kind, size, offset, shape, strides, legacy):
    integers = lambda values: b"(" + b"".join(b"I%d\n" % v for v in values) + b"t"  # noqa: E731
    storage = b"(Vstorage\nctorch\n%s\nV%s\nVcpu\nI%d\n%stQ" % (kind, key, size, b"N" * legacy)
    rest = b"I%d\n%s%sI00\nccollections\nOrderedDict\n)R" % (
        offset,
        integers(shape),
        integers(strides),
    )
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + rest + b"tR"


def _state_pickle(legacy, stretch=1):
    tensors = {
        b"a.weight": _tensor(b"0", b"FloatStorage", 24, 0, (2 * stretch, 3, 4), (12, 4, 1), legacy),
        b"a.steps": _tensor(b"1", b"LongStorage", 1, 0, (), (), legacy),
        b"shared": _tensor(b"0", b"FloatStorage", 24, 2, (3, 4), (1, 3), legacy),
    }
    items = b"".join(b"V%s\n%s" % item for item in tensors.items())
    return b"ccollections\nOrderedDict\n)R(" + items + b"u."


def _legacy_file(state=None):
    header = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True, "type_sizes": {"int": 4}}]
    storages = [_ARRAYS["a.steps"], _ARRAYS["a.weight"]]
    return b"".join(
        [
            *(pickle.dumps(part, 2) for part in header),
            state or _state_pickle(legacy=True),
            pickle.dumps(["1", "0"], 2),
            *(np.int64(s.size).tobytes() + s.tobytes() for s in storages),
        ]
    )


def _zip_file(state=None):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("any_name/data.pkl", state or _state_pickle(legacy=False))
        archive.writestr("any_name/data/0", _ARRAYS["a.weight"].tobytes())
        archive.writestr("any_name/data/1", _ARRAYS["a.steps"].tobytes())
    return file.getvalue()


def _read(content, tmp_path):
    (tmp_path / "state.pth").write_bytes(content)
    return inception_weights.read_torch_file(tmp_path / "state.pth")


def _assert_same_arrays(got, expected):
    assert list(got) == list(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(got[name], array, strict=True)


@pytest.mark.parametrize("content", [_legacy_file(), _zip_file()], ids=["legacy", "zip"])
def test_torch_files_are_read_without_torch(content, tmp_path):
    _assert_same_arrays(_read(content, tmp_path), _ARRAYS)


@pytest.mark.parametrize("is_zip", [False, True])
def test_torch_files_are_read_as_torch_writes_them(is_zip, tmp_path):
    torch = pytest.importorskip("torch")
    weight = torch.from_numpy(_ARRAYS["a.weight"])
    state = torch.nn.BatchNorm2d(3).state_dict()  # carries _metadata and a running count
    state |= {"weight": weight, "view": weight[1].T}
    path = tmp_path / "state.pth"
    torch.save(state, path, _use_new_zipfile_serialization=is_zip)
    expected = {name: tensor.numpy() for name, tensor in state.items()}
    _assert_same_arrays(inception_weights.read_torch_file(path), expected)


def test_torch_files_that_do_more_are_refused(tmp_path):
    evil = b"cos\nsystem\n(Vtouch harm\ntR."
    for content in (_legacy_file(evil), _zip_file(evil), evil):
        with pytest.raises(pickle.UnpicklingError, match=r"asks for os\.system"):
            _read(content, tmp_path)
    of_a_view = _state_pickle(True).replace(b"I24\nNtQ", b"I24\n(V9\nI0\nI2\nttQ")
    with pytest.raises(pickle.UnpicklingError, match="a view of a storage"):
        _read(_legacy_file(of_a_view), tmp_path)
    for beyond in (
        _legacy_file(_state_pickle(True, stretch=2)),
        _zip_file(_state_pickle(False, stretch=2)),
    ):
        with pytest.raises((ValueError, TypeError), match=r"buffer|strides"):
            _read(beyond, tmp_path)
    with pytest.raises(ValueError, match="ends inside a tensor"):
        _read(_legacy_file()[:-1], tmp_path)
    with pytest.raises(ValueError, match=r"not a file of torch\.save"):
        _read(b"".join(pickle.dumps(part) for part in (1, 2, 3)), tmp_path)


# Where the weights come from


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A "release" of a legacy file at a file:// URL; the tensors behind it are random ones."""
    home = tmp_path / "home"
    source = tmp_path / "release" / inception_weights.FILE
    source.parent.mkdir()
    source.write_bytes(_legacy_file())
    monkeypatch.setattr(inception_weights, "URL", source.as_uri())
    monkeypatch.setattr(
        inception_weights, "SHA256", hashlib.sha256(source.read_bytes()).hexdigest()
    )
    monkeypatch.setattr(inception_weights, "DEFAULT_PATH", str(home / inception_weights.FILE))
    monkeypatch.delenv(inception_weights.VARIABLE, raising=False)
    reads = []

    def read(path):
        reads.append(path)
        return _random_torch_state()

    monkeypatch.setattr(inception_weights, "read_torch_file", read)
    return source, home, reads


def _assert_same_params(got, expected):
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_weights_are_downloaded_once_and_converted_once(published):
    source, home, reads = published
    expected = inception_weights.params_from_torch(_random_torch_state(), "here")
    _assert_same_params(inception_weights.load_params(), expected)
    assert {path.suffix for path in home.iterdir()} == {".pth", ".npz"}
    assert (home / inception_weights.FILE).read_bytes() == source.read_bytes()
    source.unlink()
    _assert_same_params(inception_weights.load_params(), expected)
    (home / inception_weights.FILE).unlink()
    _assert_same_params(inception_weights.load_params(), expected)
    assert len(reads) == 1


def test_weights_may_be_named_by_field_or_environment(published, monkeypatch):
    source, home, _ = published
    inception_weights.load_params(str(source))
    assert source.with_suffix(".npz").is_file()
    monkeypatch.setenv(inception_weights.VARIABLE, str(source))
    inception_weights.load_params()
    monkeypatch.setenv(inception_weights.VARIABLE, "/nowhere/at/all.pth")
    inception_weights.load_params(str(source))
    with pytest.raises(InputError, match=r"'/nowhere/at/all\.pth' cannot be had \(is not a file"):
        inception_weights.load_params()
    with pytest.raises(InputError, match=r"'\.' cannot be had \(is not a file"):
        inception_weights.load_params(".")
    assert not home.exists()


def test_absent_weights_say_where_to_get_and_put_them(published, monkeypatch):
    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    with pytest.raises(InputError) as error:
        inception_weights.load_params()
    message = str(error.value)
    for part in (
        inception_weights.URL,
        "VAEBAL_INCEPTION_WEIGHTS",
        inception_weights.DEFAULT_PATH,
        "no network",
    ):
        assert part in message
    assert "field inception_weights" in message


def test_wrong_checksums_are_told(published, monkeypatch):
    source, home, reads = published
    source.write_bytes(source.read_bytes()[:-1])
    for named in (str(source), ""):
        with pytest.raises(
            InputError, match=f"is damaged or is not.*not {inception_weights.SHA256}"
        ):
            inception_weights.load_params(named)
    assert list(home.iterdir()) == []
    assert reads == []


def test_damaged_conversions_are_told(published, monkeypatch):
    source, _, _ = published
    converted = source.with_suffix(".npz")
    shapes = {"Mixed_7a/branch3x3_1/bias": (192,)}
    monkeypatch.setattr(inception_weights, "parameter_shapes", lambda: shapes)
    good = {"source_sha256": inception_weights.SHA256, "Mixed_7a/branch3x3_1/bias": np.zeros(192)}
    np.savez(converted, **good)
    assert inception_weights.load_params(str(source))["Mixed_7a"]["branch3x3_1"]["bias"].shape == (
        192,
    )
    for change, message in (
        ({"source_sha256": "0"}, "was not converted from"),
        (
            {"Mixed_7a/branch3x3_1/bias": np.zeros(3)},
            r"branch3x3_1/bias of shape \(3,\), not \(192",
        ),
    ):
        np.savez(converted, **(good | change))
        with pytest.raises(InputError, match=message + ".*delete it and run again"):
            inception_weights.load_params(str(source))
    np.savez(converted, source_sha256=inception_weights.SHA256)
    with pytest.raises(InputError, match=r"lacks 1 of 1 tensors.*delete it and run again"):
        inception_weights.load_params(str(source))
    converted.write_bytes(converted.read_bytes()[:-40])
    with pytest.raises(InputError, match=r"is damaged.*delete it and run again"):
        inception_weights.load_params(str(source))


# Against PyTorch


class _InTorch(_RandomWeights):
    """Float64, NCHW."""

    def __init__(self, torch, seed):
        super().__init__(seed)
        self.torch, self.functional = torch, torch.nn.functional

    def layer(self, name, layer, x):
        weight, gain, shift = map(self.torch.from_numpy, self.draw(name, x.shape[1], layer))
        padding = [s // 2 * layer.padded for s in layer.size]
        x = self.functional.conv2d(x, weight.double(), stride=layer.stride, padding=padding)
        mean = self.torch.from_numpy(self.add(f"{name}.bn.running_mean", x.mean((0, 2, 3))))
        variance = self.torch.from_numpy(self.add(f"{name}.bn.running_var", x.var((0, 2, 3))))
        parts = (part.double() for part in (mean, variance, gain, shift))
        return self.functional.relu(self.functional.batch_norm(x, *parts, eps=0.001))

    def pool(self, kind, x):
        if kind == "mean":
            return self.functional.avg_pool2d(x, 3, 1, padding=1, count_include_pad=False)
        stride, padding = (2, 0) if kind == "halve" else (1, 1)
        return self.functional.max_pool2d(x, 3, stride, padding)

    def side_by_side(self, tensors):
        return self.torch.cat(tensors, 1)


@pytest.mark.slow
def test_features_are_pytorchs(tmp_path):
    """At full size, from uint8 images and a file of torch.save."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(8)
    patches = rng.uniform(0, 255, (2, 6, 8, 3)).repeat(16, 1).repeat(16, 2)
    images = np.clip(patches + rng.normal(0, 20, patches.shape), 0, 255).astype(np.uint8)
    x = np.array(inception.preprocess(images))
    oracle, features = _InTorch(torch, 9), []
    _follow(_NETWORK, torch.from_numpy(x).permute(0, 3, 1, 2).double(), oracle, features)
    features = [feature.permute(0, 2, 3, 1).numpy() for feature in features]

    path = tmp_path / "random.pth"
    state = {name: torch.from_numpy(value) for name, value in oracle.state.items()}
    torch.save(state, path, _use_new_zipfile_serialization=False)
    params = inception_weights.params_from_torch(
        inception_weights.read_torch_file(path), "random.pth"
    )
    got = _check_features(params, x, features, oracle.state)
    alone = inception.inception_features(params, images, block=2)
    assert np.linalg.norm(alone - got.pool) < 1e-4 * np.linalg.norm(alone)


def test_pixels_in_minus_one_to_one_are_refused_however_bright():
    """Their mean is positive, and a third of them would be clipped away; overshoot is not."""
    rng = np.random.default_rng(0)
    photos = rng.beta(1.2, 0.8, size=(2, 16, 16, 3))
    scaled = 2 * photos - 1
    assert scaled.mean() > 0
    assert (scaled < 0).mean() > 0.3
    with pytest.raises(ValueError, match=r"% of its pixels outside \[-0.25, 1.25\] .*scaled to"):
        inception.inception_features({}, scaled, 2)
    inception._check_images(photos + rng.normal(scale=0.05, size=photos.shape))
