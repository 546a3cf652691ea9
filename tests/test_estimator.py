"""`fit` and `BalancedVAE`: scale, files, methods on one small fit, and what is refused."""

import copy
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from sklearn.exceptions import NotFittedError
from sklearn.utils.estimator_checks import parametrize_with_checks

import vaebal
from vaebal.data import steps_per_epoch
from vaebal.errors import Diverged, InputError
from vaebal.estimator import BalancedVAE, load
from vaebal.estimator import rows as rows_module
from vaebal.estimator.plan import plan
from vaebal.estimator.rows import Scale, read, scale_of
from vaebal.estimator.train import (
    CHUNKS,
    Fitted,
    Given,
    HeldOut,
    _parts,
    _settled,
    build,
    objective,
)
from vaebal.models import latent_noise
from vaebal.streams import stream
from vaebal.training import At, Member

NOISE = 0.03  # standard deviation, of every feature of the fitted square
SCALE = 1000.0


def plane(examples=1200, dim=8, seed=0):
    """A flat square of dimension 2 in `dim` features, edges of variance 1 and .4."""
    rng = np.random.default_rng(seed)
    axes = np.linalg.qr(rng.normal(size=(dim, 2)))[0]
    sides = rng.uniform(-1, 1, (examples, 2)) * np.sqrt(3 * np.array([1.0, 0.4]))
    return sides @ axes.T


def noisy_square():
    """Samples of it, with noise, scaled and shifted; the first 400 are fitted."""
    x = plane(1400)
    return SCALE * (x + NOISE * np.random.default_rng(1).normal(size=x.shape)) - 5e4


@pytest.fixture(scope="module")
def fitted():
    """For as long as the smallest plan has it."""
    X = noisy_square()[:400]
    return BalancedVAE(max_latents=3).fit(X), X


def test_a_square_has_two_dimensions(fitted):
    vae, X = fitted
    assert vae.dimension_ == 2
    # What is left is the noise, off the square; gamma is its variance.
    assert vae.error_ == pytest.approx(6 * (SCALE * NOISE) ** 2, rel=0.5)
    assert vae.gamma_ == pytest.approx((SCALE * NOISE) ** 2, rel=0.5)
    assert vae.certificate_.verdict != "under-regularized"
    told = vae.certificate_.evidence  # in the data's own units, as all that it has
    assert told.gamma == pytest.approx(vae.gamma_)
    assert told.unexplained.value * X.var(0).sum() == pytest.approx(vae.error_, rel=0.5)


def test_the_way_there_and_back(fitted):
    vae, X = fitted
    z, variance = vae.transform(X, return_variance=True)
    assert z.shape == variance.shape == (len(X), 2)
    assert ((variance > 0) & (variance < 0.1)).all()
    back = vae.inverse_transform(z)
    held = np.square(back - X).sum(1).mean()
    assert held == pytest.approx(vae.error_, rel=0.5)
    # A row's result is its own, whatever else is asked for with it.
    np.testing.assert_array_equal(vae.transform(X[5:6]), z[5:6])


def test_the_held_out_bound_is_eq_2_at_its_best_gamma(fitted):
    """Of 300 rows, which are no multiple of a block's."""
    vae, X = fitted
    rows = np.float32(vae._scale.standardise(X)[:300])
    bound, gamma = HeldOut(vae._model, rows, 5)(vae._params, vae.dimension_)
    mean, log_var = vae._encode(rows)
    eps = np.asarray(latent_noise(stream(5, "held out"), 512, vae.plan_.latents))[:300, :2]
    decoded = vae._decode(mean + np.exp(log_var / 2) * eps)
    square = np.square(rows - decoded).sum(1).mean() / 8
    kl = 0.5 * (mean**2 + np.exp(log_var) - log_var - 1).sum(1).mean()
    assert gamma == pytest.approx(square, rel=1e-3)
    assert bound == pytest.approx(4 * (np.log(2 * np.pi * square) + 1) + kl, rel=1e-3)


def test_the_homotopy_is_shown_held_out_rows():
    """By training rows a few latents could hold by heart any number of them."""
    member = Member(0, 3)
    model = build(plan(100, 6, 3), 6)
    loss, given = objective(model), Given(jnp.zeros(6), jnp.ones((5, 6)))
    params = {**loss.init(member, given), "log_gamma": jnp.zeros(())}
    at = At(member, jnp.asarray(0), jnp.asarray(2), given)
    _, told = loss.loss(params, jnp.zeros((8, 6)), at)
    mean, _ = model.apply({"params": params}, jnp.ones((2, 6)), 2, method="encode")
    expected = 1 - model.apply({"params": params}, mean, method="decode")
    np.testing.assert_allclose(loss.residual(params, told), expected, rtol=1e-5)


def test_images_come_back_as_images(fitted, tmp_path):
    vae, X = copy.copy(fitted[0]), fitted[1]
    vae.image_shape_, images = (2, 4, 1), X.reshape(-1, 2, 4, 1)
    z = vae.transform(images)
    np.testing.assert_array_equal(z, vae.transform(X))
    back = vae.inverse_transform(z)
    assert back.shape == images.shape
    np.testing.assert_array_equal(back.reshape(X.shape), fitted[0].inverse_transform(z))
    assert vae.sample(3).shape == (3, 2, 4, 1)
    vae.save(tmp_path / "m.npz")
    assert load(tmp_path / "m.npz").image_shape_ == (2, 4, 1)


def test_a_folder_is_read_whole(tmp_path, monkeypatch):
    """Those that an experiment would keep for its test, too."""
    monkeypatch.setenv("VAEBAL_DATA_DIR", str(tmp_path / "cache"))
    (tmp_path / "f").mkdir()
    for level in range(12):
        Image.new("RGB", (9, 9), (20 * level,) * 3).save(tmp_path / f"f/{level}.png")
    x = np.asarray(read(tmp_path / "f", resolution=8))
    assert x.shape == (12, 8, 8, 3)
    assert sorted(x[:, 0, 0, 0].tolist()) == list(range(0, 240, 20))


def test_a_budget_is_in_minutes(monkeypatch):
    deadlines = []

    def train(chosen, rows, held_out, seed, tell, deadline, kept):
        deadlines.append(deadline)
        raise Diverged("enough seen")

    monkeypatch.setattr("vaebal.estimator.balanced.train_vae", train)
    monkeypatch.setattr("vaebal.estimator.balanced.time", SimpleNamespace(monotonic=lambda: 1000.0))
    for budget, expected in ((3, 1180.0), (None, np.inf)):
        with pytest.raises(Diverged, match="enough seen"):
            BalancedVAE(budget=budget).fit(plane())
        assert deadlines.pop() == expected


def test_samples_lie_on_the_square(fitted):
    vae, X = fitted
    x = vae.sample(200, seed=3)
    np.testing.assert_array_equal(x, vae.sample(200, seed=3))
    axes = np.linalg.svd(X - X.mean(0), full_matrices=False)[2]
    off = (x - X.mean(0)) @ axes[2:].T if len(axes) > 2 else np.zeros(1)
    assert np.square(off).sum(1).mean() < 0.01 * X.var(0).sum()
    noisy = vae.sample(200, seed=3, noise=True) - x
    assert noisy.var() == pytest.approx(vae.gamma_, rel=0.2)


def test_the_score_is_a_log_density_in_the_datas_own_units(fitted):
    """Below what the samples' own density says of them, and near it."""
    vae, _ = fitted
    fresh = noisy_square()[400:]
    scores = vae.score_samples(fresh)
    assert vae.score(fresh) == pytest.approx(scores.mean())
    # E log p(x), but for the square's blurred edges: the square's area, and six normal features.
    area = np.log(12 * 0.4**0.5 * SCALE**2)
    true = -area - 3 * np.log(2 * np.pi * np.e * (SCALE * NOISE) ** 2)
    assert true - 3 < vae.score(fresh) < true


def test_it_is_kept_in_a_file(fitted, tmp_path):
    vae, X = fitted
    vae.save(tmp_path / "model.npz")
    again = load(tmp_path / "model.npz")
    np.testing.assert_array_equal(again.transform(X[:7]), vae.transform(X[:7]))
    assert (again.dimension_, again.gamma_, again.error_) == (
        vae.dimension_, vae.gamma_, vae.error_,
    )  # fmt: skip
    assert again.get_params() == vae.get_params()
    assert list(again.get_feature_names_out()) == ["balancedvae0", "balancedvae1"]
    np.savez(tmp_path / "foreign.npz", about="[1]")
    with pytest.raises(InputError, match=r"foreign.npz is not what BalancedVAE.save writes"):
        load(tmp_path / "foreign.npz")
    (tmp_path / "other.npz").write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"other.npz is no .npz file, or not the whole"):
        load(tmp_path / "other.npz")


def few_steps(*sizes):
    """A plan of the same kind that is done in a blink."""
    few = {"width": 8, "blocks": 1, "steps": 40, "settle_steps": 40, "patience": 6}
    return plan(*sizes)._replace(**few)


@pytest.mark.slow
def test_an_interrupted_fit_goes_on_to_the_same_end(tmp_path, monkeypatch):
    """Stopped in the middle of each phase; other data in the folder are refused."""
    monkeypatch.setattr("vaebal.estimator.balanced.plan", few_steps)
    X = noisy_square()[:400]
    vae = BalancedVAE(max_latents=3).fit(X)
    again, told = BalancedVAE(max_latents=3, path=tmp_path), []

    def stop(phase, share, values):
        told.append(phase)
        if len(told) in (7, 60):  # of 40 parts of an epoch each, one of which is done twice
            raise KeyboardInterrupt

    monkeypatch.setattr(again, "_tell", stop)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            again.fit(X)
    assert (told[6], told[59]) == ("count", "settle0")
    again.fit(X)
    np.testing.assert_array_equal(again.transform(X[:9]), vae.transform(X[:9]))
    assert (again.gamma_, len(again.history_)) == (vae.gamma_, len(vae.history_))
    before = len(told)
    again.fit(X)
    assert len(told) == before  # finished: nothing is trained again
    with pytest.raises(InputError, match="holds a fit of other data, or with other arguments"):
        again.fit(X[::-1])


def same(one, other, X):
    np.testing.assert_array_equal(one.transform(X), other.transform(X))
    return (one.gamma_, one.error_, one.settled_) == (other.gamma_, other.error_, other.settled_)


@pytest.mark.slow
def test_what_a_budget_cut_off_goes_on_to_the_same_end(tmp_path, monkeypatch):
    """What had settled at a count found in part is not gone on with at the whole one's."""
    monkeypatch.setattr("vaebal.estimator.balanced.plan", few_steps)
    X = noisy_square()[:400]
    cut = BalancedVAE(max_latents=3, path=tmp_path, budget=1e-9).fit(X)
    assert len(cut.history_) < 5
    assert not cut.settled_  # nobody knows
    went_on, whole = BalancedVAE(max_latents=3, path=tmp_path), BalancedVAE(max_latents=3)
    assert same(went_on.fit(X), whole.fit(X), X)


@pytest.mark.slow
def test_it_trains_in_float32_and_takes_numpys_integers(tmp_path, monkeypatch):
    monkeypatch.setattr("vaebal.estimator.balanced.plan", few_steps)
    X = noisy_square()[:400]
    plain = BalancedVAE(max_latents=3, seed=1).fit(X)
    with jax.enable_x64(True):
        odd = BalancedVAE(max_latents=np.int64(3), seed=np.int64(1)).fit(X)
    assert same(odd, plain, X)
    odd.save(tmp_path / "odd.npz")
    assert load(tmp_path / "odd.npz").seed == 1


@pytest.mark.slow
def test_rows_that_repeat_have_no_verdict_and_a_fit_all_the_same(monkeypatch):
    monkeypatch.setattr("vaebal.estimator.balanced.plan", few_steps)
    bits = np.random.default_rng(0).integers(0, 2, (200, 3))
    vae = BalancedVAE().fit(bits)
    assert vae.certificate_ is None
    assert vae.inverse_transform(vae.transform(bits)).shape == bits.shape


@pytest.fixture
def untrained(monkeypatch):
    """Sets what training gives, a call each; returns the sizes that were asked for."""
    found, asked = [], []

    def train(plan, *_):
        asked.append(plan.latents)
        return found.pop(0)

    monkeypatch.setattr("vaebal.estimator.balanced.train_vae", train)
    monkeypatch.setattr(BalancedVAE, "_errors", lambda self, rows: np.zeros(1))
    monkeypatch.setattr(BalancedVAE, "_certified", lambda self, rows: None)
    return found, asked


@pytest.mark.parametrize(("whole", "kept"), [(False, 32), (True, 40)])
def test_a_wider_fit_that_the_budget_ends_does_not_replace_the_one_before(untrained, whole, kept):
    found, asked = untrained
    params = {"log_gamma": np.zeros(())}
    found += [Fitted(params, 32, [], True, True), Fitted(params, 40, [], whole, False)]
    vae = BalancedVAE().fit(np.random.default_rng(0).normal(size=(100, 70)))
    assert asked == [32, 64]
    assert (vae.dimension_, vae.plan_.latents) == (kept, 32 if kept == 32 else 64)


def test_a_fit_that_fails_leaves_no_half_of_the_one_before(untrained):
    found, _ = untrained
    found += [Fitted({"log_gamma": np.zeros(())}, 1, [], True, True)]
    vae = BalancedVAE(max_latents=2).fit(plane(20))
    with pytest.raises(IndexError):  # as an interrupt would
        vae.fit(plane(20) + 1e6)
    with pytest.raises(NotFittedError):
        vae.transform(plane(20))


def test_images_of_another_layout_are_refused(untrained):
    found, _ = untrained
    found += [Fitted({"log_gamma": np.zeros(())}, 1, [], True, True)]
    random = np.random.default_rng(0)
    vae = BalancedVAE(max_latents=2).fit(list(random.normal(size=(20, 4, 2, 3))))
    assert vae.image_shape_ == (4, 2, 3)
    with pytest.raises(InputError, match=r"images of shape \(3, 4, 2\): give \(4, 2, 3\)"):
        vae.transform(random.normal(size=(5, 3, 4, 2)))


def test_the_scale_is_the_largest_standard_deviation():
    X = plane(2000)
    scale = scale_of(X)
    largest = np.linalg.eigvalsh(np.cov(X.T, ddof=0))[-1]
    assert scale.scale == pytest.approx(largest**0.5, rel=1e-6)
    rows = scale.standardise(X)
    np.testing.assert_allclose(rows.mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(scale.restore(rows), X, atol=1e-6)


@pytest.mark.parametrize(("factor", "shift"), [(1000.0, -5e4), (1e-9, 0.0), (1e150, 0.0)])
def test_scaled_and_shifted_data_are_the_same_rows(factor, shift):
    X = plane(300)
    got, expected = (scale_of(x).standardise(x) for x in (factor * X + shift, X))
    np.testing.assert_allclose(got, expected, atol=1e-6)


@pytest.mark.parametrize("value", [7.0, 0.1, 0.3, 7.7])  # the mean of some is rounded
def test_samples_that_do_not_differ_are_refused(value):
    with pytest.raises(InputError, match="X does not vary"):
        BalancedVAE().fit(np.full((50, 3), value))


@pytest.mark.parametrize(
    ("X", "said"),
    [
        (np.zeros(5), "Expected 2D array"),
        (np.zeros((3, 2)), "minimum of 8 is required"),
        (np.full((20, 2), np.nan), "contains NaN"),
        (np.array([["a", "b"]] * 20, dtype=object), "could not convert string to float"),
        (np.ma.masked_greater(np.arange(40.0).reshape(20, 2), 30), "X has masked values"),
        ([np.zeros((2, 2, 1)), np.zeros((3, 2, 1))], "inhomogeneous"),
        (np.zeros((0, 2, 2, 1)), "minimum of 8 is required"),
    ],
)
def test_what_is_no_data_is_refused(X, said):
    with pytest.raises(InputError, match=said):
        BalancedVAE().fit(X)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"max_latents": 0}, "max_latents=0 must be"),
        ({"max_latents": 2.5}, "max_latents=2.5 must be an integer"),
        ({"budget": -1.0}, "budget=-1.0 must be"),
        ({"budget": "5"}, "budget='5' must be minutes"),
        ({"seed": -1}, "seed=-1 must be an integer from 0 to 2147483647"),
        ({"seed": None}, "seed=None must be"),
        ({"seed": 2**31}, "seed=2147483648 must be"),
    ],
)
def test_arguments_that_cannot_be_meant_are_refused(arguments, said):
    with pytest.raises(InputError, match=said):
        BalancedVAE(**arguments).fit(plane(20))


def test_latents_of_another_number_are_refused(fitted):
    vae, _ = fitted
    with pytest.raises(InputError, match=r"Z has shape \(4, 3\): give \[N, 2\]"):
        vae.inverse_transform(np.zeros((4, 3)))
    with pytest.raises(InputError, match=r"Z has shape \(0, 2\)"):
        vae.inverse_transform(np.zeros((0, 2)))
    with pytest.raises(InputError, match="Z has values that are not finite"):
        vae.inverse_transform([[0.0, np.nan]])
    with pytest.raises(InputError, match="n=0 must be an integer of at least 1"):
        vae.sample(0)


def test_files_are_read(tmp_path):
    X = plane(10, 3)
    np.save(tmp_path / "a.npy", X)
    np.savez(tmp_path / "b.npz", x=X, labels=np.arange(10))
    np.savetxt(tmp_path / "c.csv", X, delimiter=",")
    np.savetxt(tmp_path / "d.csv", X, delimiter=",", header="p,q,r", comments="")
    np.savetxt(tmp_path / "pandas.csv", X, delimiter=",", header="0,1,2", comments="")
    np.savetxt(tmp_path / "excel.csv", X, delimiter=",", encoding="utf-8-sig")
    for name in ("a.npy", "b.npz", "c.csv", "d.csv", "pandas.csv", "excel.csv"):
        np.testing.assert_allclose(read(tmp_path / name), X)
    for name, text in (("gap", "1.0,,3\n1,2,3"), ("words", "1.0,two,3\n1,2,3")):
        (tmp_path / f"{name}.csv").write_text(text)
        with pytest.raises(InputError, match="among the numbers of its first line"):
            read(tmp_path / f"{name}.csv")
    (tmp_path / "index.csv").write_text(",p,q\n0,1.5,2\n1,2.5,3")
    with pytest.raises(InputError, match=r"a first column without a name.*\(index=False\)"):
        read(tmp_path / "index.csv")
    np.savez(tmp_path / "e.npz", p=X, q=X)
    (tmp_path / "f.npy").write_bytes(b"no array")
    for name, said in (
        ("e.npz", "holds the arrays p, q: name the one to fit 'x'"),
        ("f.npy", "cannot be read as .npy"),
        ("g.npy", "does not exist"),
    ):
        with pytest.raises(InputError, match=said):
            read(tmp_path / name)
    (tmp_path / "h.txt").write_text("1,2")
    with pytest.raises(InputError, match="is of no kind that can be read"):
        read(tmp_path / "h.txt")


def test_a_plan_knows_the_size_alone():
    small, large = plan(100, 5), plan(20_000, 784)
    assert (small.latents, large.latents) == (5, 32)
    assert small.steps < large.steps == 20_000
    assert small.batch_size == 100
    assert plan(20_000, 784, max_latents=7).latents == 7


@pytest.mark.parametrize("examples", [100, 9_000, 90_000, 900_000, 12_345_678])
def test_no_chunk_is_longer_than_its_share_of_the_steps(examples):
    """A pass over many rows is cut: 900,000 took 27,000 steps, told of three times."""
    chosen = plan(examples, 50)
    whole = steps_per_epoch(examples, chosen.batch_size)
    each = whole // _parts(chosen, examples)
    assert 1 <= each <= chosen.steps / CHUNKS
    assert -(-chosen.steps // each) * each < 1.03 * chosen.steps
    assert each == whole or examples > 50_000


def test_a_count_is_settled_where_no_latent_opened_late():
    chosen = plan(20_000, 50)
    steps = np.linspace(500, 20_000, 40)

    def history(opened, closed=None):
        number = 1 + (steps[:, None] > np.array(opened)[None]).sum(1)
        number = number - (0 if closed is None else steps > closed)
        return [{"open": n, "step": s} for n, s in zip(number, steps, strict=True)]

    assert _settled(history([2000, 5000]), chosen)
    assert not _settled(history([2000, 14_000]), chosen)
    assert _settled(history([2000, 14_000], closed=15_500), chosen)  # offered, and of no use
    # Chunks so long that the last ones opened within the one in which the guard went.
    long = [{"open": n, "step": s} for n, s in ((3, 9_000), (6, 18_000), (6, 27_000))]
    assert not _settled(long, chosen)


def test_the_contract_is_what_init_names():
    assert {"fit", "BalancedVAE", "load", "diagnose", "implied_gamma"} <= set(dir(vaebal))
    assert vaebal.BalancedVAE is BalancedVAE
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = vaebal.nothing


def test_one_scale_for_all_features():
    scale = Scale(np.array([1.0, 2.0]), 4.0)
    np.testing.assert_array_equal(scale.standardise(np.array([[5.0, -2.0]])), [[1.0, -1.0]])


@pytest.mark.slow
@parametrize_with_checks([BalancedVAE(max_latents=2)])
def test_scikit_learns_own_checks(estimator, check, monkeypatch):
    """Of what an estimator takes, refuses and keeps, for which a few steps will do."""
    monkeypatch.setattr("vaebal.estimator.balanced.plan", few_steps)
    monkeypatch.setattr("vaebal.estimator.train.CHUNKS", 4)
    check(estimator)


def test_rows_are_standardised_in_any_order_into_memory_that_a_device_takes_as_it_is(monkeypatch):
    monkeypatch.setattr(rows_module, "STANDARDISED", 7)
    X = noisy_square()[:100]
    scale, order = scale_of(X), np.random.default_rng(2).permutation(100)[:90]
    rows = scale.standardise_in(X, order)
    np.testing.assert_array_equal(rows, scale.standardise(X)[order])
    placed = jax.device_put(rows)
    assert placed.unsafe_buffer_pointer() == rows.ctypes.data


def test_errors_do_not_depend_on_how_many_rows_are_looked_at_together(fitted, monkeypatch):
    vae, X = fitted
    rows = vae._scale.standardise(X)
    expected = np.square(rows - vae._scale.standardise(vae.inverse_transform(vae.transform(X))))
    monkeypatch.setattr("vaebal.estimator.balanced.BLOCK", 3)
    np.testing.assert_allclose(vae._errors(rows), expected.sum(1), rtol=1e-4)


@pytest.mark.slow
def test_a_fit_takes_the_memory_of_its_rows_once_more():
    """Peak memory beyond the data's own, of fits in processes of their own, by size.

    Once more are the standardised rows; half as much again has what is computed of those held out.
    """
    program = (
        "import resource, sys; import numpy as np; import vaebal.estimator.balanced as b\n"
        "whole, b.JUDGED = b.plan, 10**9\n"
        "few = {'steps': 1, 'settle_steps': 1, 'batch_size': 5000, 'blocks': 1}\n"
        "b.plan = lambda *sizes: whole(*sizes)._replace(**few)\n"
        "rng, X = np.random.default_rng(0), np.empty((int(sys.argv[1]), 192), np.float32)\n"
        "for i in range(0, len(X), 500): X[i : i + 500] = rng.normal(size=(500, 192))\n"
        "b.BalancedVAE(max_latents=3).fit(X)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - X.nbytes)\n"
    )
    few, many = 10_000, 90_000
    started = [
        subprocess.Popen([sys.executable, "-c", program, str(size)], stdout=subprocess.PIPE)
        for size in (few, many)
    ]
    beyond = [int(each.communicate()[0]) for each in started]
    assert beyond[1] - beyond[0] < 2 * (many - few) * 192 * 4
