import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import (
    celeba128_generation,
    digits_generation,
    folder_generation,
    mnist_generation,
    rendered64_generation,
)
from vaebal.data import load
from vaebal.errors import InputError
from vaebal.experiments import cells, verdicts
from vaebal.experiments.generation import figures, tables
from vaebal.experiments.generation import page as generation_report
from vaebal.experiments.generation import run as generation
from vaebal.experiments.generation import scores as generation_scores
from vaebal.experiments.generation import stages as generation_stages
from vaebal.experiments.generation.pipeline import Stage, method
from vaebal.generation import classifier, priors, stages
from vaebal.measures import inception, inception_weights
from vaebal.measures.frechet import frechet_distance
from vaebal.training.progress import Progress


def tiny():
    """One pipeline of a few steps: AE, VAE, VAE+, WAE-MMD on the digits."""
    config = digits_generation.get_config("quick")
    config.train.seeds = (0,)
    config.train.batch_size = 256
    config.train.epochs_per_checkpoint = 2
    config.ae.codes = 4
    config.vae.spaces = ("pixels",)
    config.classifier.features = 6
    for section in (config.ae, config.vae, config.vae_plus, config.wae, config.classifier):
        section.width, section.epochs, section.learning_rate = 16, 3, 1e-2
    config.balanced.epochs, config.balanced.settled_epochs = 3, 2
    config.flow.epochs = 0
    config.eval.bins = (5,)
    config.eval.parts = 2
    config.eval.samples, config.eval.reference_images = 250, 1000
    config.eval.block = 200  # the last of 250 test images fill no block
    config.eval.pictures = 3
    return config


def session_of(config, path):
    images = load("digits")
    return generation_stages.Session(config, path, images, classifier.targets_of(images))


def without_times(rows):
    return [{k: v for k, v in row.items() if k != "train_seconds"} for row in rows]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A workdir of the tiny pipeline, and its rows."""
    path = tmp_path_factory.mktemp("finished")
    return path, generation.run(tiny(), str(path))


@pytest.mark.slow
def test_every_method_has_its_rows_and_figures(finished):
    path, rows = finished
    methods = ["held-out images", "Downsample", "AE", "VAE", "VAE+", "WAE-MMD"]
    assert [row["method"] for row in rows] == methods
    for row in rows:
        assert ("rec_fd" in row) == (row["method"] != "held-out images")
        assert ("gen_fd" in row) == (row["method"] != "AE")
        assert (row["images"], row["reference_images"]) == (250, 1000)
        assert row["without_fid"] == "not asked for (eval.fid)"
        assert not any("fid" in name and name.startswith(("rec", "gen")) for name in row)
    for name in ("table.md", "samples.png", "nearest.png", "interpolations.png", "bins.png"):
        assert (path / name).stat().st_size > 1000
    text = (path / "table.md").read_text()
    assert "FD (classifier) gen." in text
    assert "No FID: not asked for" in text


@pytest.mark.slow
def test_stages_are_finished_in_order_and_each_has_its_own_folder(finished):
    path, _ = finished
    names = {"ae_seed0", "vae_pixels_seed0", "vae_plus_pixels_seed0", "wae_seed0"}
    assert {folder.name for folder in (path / "stages").iterdir()} == names | {"classifier_seed0"}
    times = {folder.name: (folder / "row.json").stat().st_mtime for folder in
             (path / "stages").iterdir()}  # fmt: skip
    assert times["ae_seed0"] < times["vae_pixels_seed0"] < times["vae_plus_pixels_seed0"]


@pytest.mark.slow
def test_what_is_finished_is_not_trained_again(finished, monkeypatch):
    path, rows = finished
    monkeypatch.setattr(cells, "fit", lambda *_, **__: pytest.fail("trained again"))
    monkeypatch.setattr(
        generation_scores.Scorer, "__call__", lambda *_: pytest.fail("scored again")
    )
    assert generation.run(tiny(), str(path)) == rows


@pytest.mark.slow
def test_a_pipeline_killed_in_a_later_stage_goes_on_to_the_same_numbers(
    finished, tmp_path, monkeypatch
):
    path, rows = finished
    work, last = tmp_path / "work", "vae_plus_pixels_seed0"
    # As a kill in the second stage's third epoch leaves it: what comes later does not exist.
    shutil.copytree(path, work)
    for made in ("evaluation", f"stages/{last}", f"checkpoints/{last}"):
        shutil.rmtree(work / made)
    real, trained = cells.fit, []

    def killed(program, *, report, **options):
        def stop(epoch, *told):
            report(epoch, *told)
            if epoch == 3:
                raise KeyboardInterrupt

        return real(program, report=stop, **options)

    def counted(program, **options):
        trained.append(options["checkpoints"].directory.name)
        assert options["checkpoints"].latest == 2
        return real(program, **options)

    monkeypatch.setattr(cells, "fit", killed)
    with pytest.raises(KeyboardInterrupt):
        generation.run(tiny(), str(work))
    assert not (work / "stages" / last / "row.json").exists()
    monkeypatch.setattr(cells, "fit", counted)
    assert without_times(generation.run(tiny(), str(work))) == without_times(rows)
    assert trained == [last]
    ours, theirs = (
        json.loads((place / "stages" / last / "row.json").read_text()) for place in (work, path)
    )
    assert without_times([ours]) == without_times([theirs])


def test_a_stage_comes_after_the_one_it_needs(tmp_path):
    """In both spaces, and of every seed; the seeds of a small stage train together."""
    config = tiny()
    config.train.seeds, config.vae.spaces = (0, 3), ("codes", "pixels")
    groups = session_of(config, tmp_path).groups
    assert [name for name in groups if "vae" in name] == [
        f"{name}_seed0-3"
        for name in ("vae_codes", "vae_plus_codes", "vae_pixels", "vae_plus_pixels")
    ]
    done = []
    for stage in (stage for group in groups.values() for stage in group):
        assert stage.before is None or stage.before in done
        done.append(stage)
    assert len(done) == 2 * 6 + 1


@pytest.mark.parametrize(
    ("stage", "kind", "space", "network", "reads", "before"),
    [
        ("ae", "ae", "", "ae", ("images",), None),
        ("wae", "wae", "", "wae", ("codes", "images"), "ae"),
        ("vae_pixels", "vae", "pixels", "vae", ("codes", "images"), "ae"),
        ("vae_codes", "vae", "codes", "vae", ("codes",), "ae"),
        ("vae_images", "vae", "images", "vae_images", ("images",), None),
        ("vae_plus_images", "vae_plus", "images", "vae_plus", ("latents",), "vae_images"),
        ("opening_balanced_codes", "opening", "balanced codes", "vae_balanced", ("codes",), "ae"),
        (
            *("vae_balanced_codes", "vae", "balanced codes", "vae_balanced", ("codes",)),
            "opening_balanced_codes",
        ),
        (
            *("opening_balanced_images", "opening", "balanced images", "vae_images"),
            *(("images",), None),
        ),
        (
            *("vae_plus_balanced_images", "vae_plus", "balanced images", "vae_plus"),
            *(("latents",), "vae_balanced_images"),
        ),
    ],
)
def test_a_stage_s_name_says_what_it_trains_on_what(stage, kind, space, network, reads, before):
    got = Stage(stage, 3)
    assert (got.kind, got.space, got.network, got.reads) == (kind, space, network, reads)
    assert got.before == (None if before is None else Stage(before, 3))


@pytest.fixture(scope="module")
def balanced(tmp_path_factory):
    """A session whose tiny balanced pipeline is trained, and its networks."""
    config, path = tiny(), tmp_path_factory.mktemp("balanced")
    config.vae.spaces = ("balanced codes", "balanced images")
    config.flow.epochs, config.flow.width, config.flow.blocks = 2, 16, 1
    session = session_of(config, path)
    with Progress(len(session.groups), path / "tensorboard") as progress:
        for name, group in session.groups.items():
            generation_stages.make(session, name, group, progress)
    return session, generation_stages.networks(session, 0)


@pytest.mark.slow
def test_its_vaes_are_judged_on_what_they_read(balanced):
    """One on images, the other on codes that are standardised over the training images."""
    session, nets = balanced
    codes, images = generation.trained(session.config, str(session.path))
    assert [vae.name for vae in (codes, images)] == [
        f"VAE of balanced {space}, seed 0" for space in ("codes", "images")
    ]
    assert codes.latents == images.latents == 1  # opened
    shape = len(session.images.test), session.models["ae"].latents
    x, x_hat, _, mean, _ = verdicts.outputs(codes, np.asarray(codes.rows))
    assert x.shape == shape
    assert not np.abs(mean[:, 1:]).any()
    assert np.abs(x.mean(0)).max() < 0.3
    assert np.abs(x.std(0) - 1).max() < 0.3
    model, params = session.models["vae_balanced"], nets["vae_balanced_codes"]
    expected = model.apply({"params": params}, mean, method="decode")
    np.testing.assert_allclose(x_hat, expected, rtol=1e-4, atol=1e-5)
    x, *_ = verdicts.outputs(images, np.asarray(images.rows))
    np.testing.assert_array_equal(x, session.images.decode(session.images.test))


@pytest.mark.slow
@pytest.mark.parametrize("space", ["balanced codes", "balanced images"])
def test_a_balanced_vae_goes_on_at_the_number_of_latents_it_opened(balanced, space):
    """From its weights, and the others tell of nothing: neither samples nor the second stage."""
    session, nets = balanced
    opening, settled = (
        Stage(f"{kind}_{space.replace(' ', '_')}", 0) for kind in ("opening", "vae")
    )
    number = session.cells.row(opening)["open"]
    assert number == 1  # of 4: in 15 steps no more than the first
    ended, start = session.params(opening), session.program([settled]).init()
    for ours, theirs in zip(
        jax.tree.leaves(start.weights),
        jax.tree.leaves({name: leaf for name, leaf in ended.items() if name != "log_gamma"}),
        strict=True,
    ):
        np.testing.assert_array_equal(ours[0], theirs)
    np.testing.assert_allclose(start.homotopy.log_gamma[0], ended["log_gamma"], rtol=1e-6)
    vae = generation_scores.first_vae(session, nets, space)
    x = jnp.asarray(session.images.test[:5])
    mean, log_var = vae.encode(x)
    assert not np.asarray(mean)[:, number:].any()
    assert not np.asarray(log_var)[:, number:].any()
    z = jax.random.normal(jax.random.key(0), (5, 4))
    closed = jnp.arange(4)[None] >= number
    np.testing.assert_allclose(vae.decode(z), vae.decode(jnp.where(closed, -z, z)), atol=1e-6)
    assert np.abs(vae.decode(z) - vae.decode(-z)).max() > 1e-4
    images, latents = generation_scores.reconstruct(session, nets, x, jnp.zeros((2, 5, 4)))
    name = method("VAE", space, session.config)
    np.testing.assert_allclose(images[name], vae.decode(mean), atol=1e-6)
    np.testing.assert_array_equal(latents[name], mean)


@pytest.mark.slow
def test_flow_matching_samples_through_the_first_decoder_and_leads_back(balanced):
    session, nets = balanced
    space, u, eps = (
        "balanced images",
        *(jax.random.normal(jax.random.key(k), (6, 4)) for k in (0, 1)),
    )
    told = nets["latents_balanced_images"]._replace(mask=jnp.array([1.0, 0.0, 1.0, 1.0]))
    nets = nets | {"latents_balanced_images": told}
    vae = generation_scores.first_vae(session, nets, space)
    name = method("Flow matching", space, session.config)
    z = priors.transported(session.models["flow"], nets["flow_balanced_images"], u, told.mask)
    whole = jnp.where(told.mask[None] > 0, z * told.scale[None] + told.centre[None], eps)
    drawn = generation_scores.generate(session, nets, u, eps)
    np.testing.assert_allclose(drawn[name], vae.decode(whole), atol=1e-5)
    assert np.abs(drawn[name] - drawn[method("VAE", space, session.config)]).max() > 1e-3
    x = jnp.asarray(session.images.test[:6])
    images, latents = generation_scores.reconstruct(session, nets, x, jnp.zeros((2, 6, 4)))
    assert name not in images  # it is the first VAE's
    used = np.asarray(told.mask) > 0
    there = priors.transported(
        session.models["flow"], nets["flow_balanced_images"], latents[name], told.mask
    )
    standard = told.standardise(vae.encode(x)[0])
    np.testing.assert_allclose(there[:, used], standard[:, used], atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("collapsed", [True, False])
def test_interpolations_pass_by_a_second_vae_that_has_collapsed(balanced, collapsed):
    """There every u is 0, and all images between would be one."""
    session, nets = balanced
    space = session.config.vae.spaces[0]
    plus, told = generation_scores.second_vae(nets, space)
    scale = 0.0 if collapsed else 30.0
    nets = nets | {"vae_plus_balanced_codes": plus | {
        "encoder": jax.tree.map(lambda leaf: scale * leaf, plus["encoder"])
    }}  # fmt: skip
    x = jnp.asarray(session.images.test[:8])
    vae = generation_scores.first_vae(session, nets, space)
    rows = generation_scores.interpolate(session, nets, x)
    ends = vae.decode(vae.encode(x)[0] * told.mask[None])
    far = np.abs(rows[:, 0] - ends[::2]).max()
    assert far < 1e-4 if collapsed else far > 1e-3


def test_the_second_stage_models_the_latents_that_tell_of_x():
    mean = jnp.asarray(np.random.default_rng(0).normal(size=(500, 3)) * [1.0, 0.05, 0.2])
    log_var = jnp.full_like(mean, jnp.log(0.25))
    some = generation_stages.taking_part(mean, log_var)
    np.testing.assert_array_equal(some.mask, [1, 0, 1])
    np.testing.assert_allclose(some.scale[0] ** 2, mean[:, 0].var() + 0.25, rtol=1e-5)
    none = generation_stages.taking_part(0 * mean, log_var)
    np.testing.assert_array_equal(none.mask, [1, 1, 1])
    np.testing.assert_allclose(none.scale, 0.5, rtol=1e-6)


@pytest.mark.slow
def test_a_seed_among_others_is_the_seed_alone(finished, tmp_path):
    path, _ = finished
    config = tiny()
    config.train.seeds = (0, 1)
    session = session_of(config, tmp_path)
    with Progress(2, tmp_path / "tensorboard") as progress:
        for name in ("ae_seed0-1", "vae_pixels_seed0-1"):
            generation_stages.make(session, name, session.groups[name], progress)
    for stage in ("ae", "vae_pixels"):
        alone = json.loads((path / "stages" / f"{stage}_seed0" / "row.json").read_text())
        among, other = (session.cells.row(Stage(stage, seed)) for seed in (0, 1))
        assert set(among) == set(alone)
        for name in ("loss", "squared_error"):
            assert among[name] == pytest.approx(alone[name], rel=1e-3), (stage, name)
            assert other[name] != pytest.approx(alone[name], rel=1e-3), (stage, name)


@pytest.mark.slow
def test_an_unfinished_stage_is_refused_where_it_is_asked_for(finished):
    path, _ = finished
    with pytest.raises(InputError, match=r"'ae_seed7' is not finished in .*: make it first"):
        generation.load_pipeline(tiny(), str(path), 7)


@pytest.mark.slow
def test_samples_go_from_the_prior_through_every_decoder(finished):
    """By hand from the stages' parameters; and reconstructions from the codes up."""
    path, _ = finished
    session, nets = generation.load_pipeline(tiny(), str(path), 0)
    models = session.models
    u, eps = (jax.random.normal(jax.random.key(k), (5, 4)) for k in (0, 1))

    def decoded(name, params, z):
        return models[name].apply({"params": nets[params]}, z, method="decode")

    gamma = jnp.exp(nets["vae_plus_pixels"]["log_gamma"])
    z = decoded("vae_plus", "vae_plus_pixels", u) + jnp.sqrt(gamma) * eps
    std, mean = nets["scale"].std[None], nets["scale"].mean[None]
    plain = decoded("ae", "ae", decoded("vae", "vae_pixels", u) * std + mean)
    plus = decoded("ae", "ae", decoded("vae", "vae_pixels", z) * std + mean)
    got = generation_scores.generate(session, nets, u, eps)
    np.testing.assert_allclose(got["VAE"], plain, atol=1e-5)
    np.testing.assert_allclose(got["VAE+"], plus, atol=1e-5)
    assert np.abs(plain - plus).max() > 0.01
    x = jnp.asarray(session.images.test[:5])
    images, latents = generation_scores.reconstruct(session, nets, x, jnp.zeros((2, 5, 4)))
    codes = models["ae"].apply({"params": nets["ae"]}, x, method="encode")[0]
    np.testing.assert_allclose(images["AE"], decoded("ae", "ae", codes), atol=1e-5)
    z = models["vae"].apply({"params": nets["vae_pixels"]}, (codes - mean) / std, method="encode")
    np.testing.assert_allclose(latents["VAE"], z[0], atol=1e-5)


@pytest.mark.slow
def test_the_codes_are_standardised_by_what_is_stored(finished):
    path, _ = finished
    session, _ = generation.load_pipeline(tiny(), str(path), 0)
    codes = np.asarray(session.codes(0))
    np.testing.assert_allclose(codes.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(codes.std(0), 1, rtol=1e-4)


@pytest.mark.slow
def test_where_images_may_not_be_shown_the_page_shows_samples_alone(finished, tmp_path):
    path, rows = finished
    work, config = tmp_path / "work", tiny()
    shutil.copytree(path, work)
    for name in ("samples", "nearest", "interpolations", "bins"):
        (work / f"{name}.png").unlink()
    config.eval.samples_only = True
    assert generation.run(config, str(work)) == rows
    assert [file.name for file in work.glob("*.png")] == ["samples.png"]
    assert set(figures.allowed({"images": 0, "rec VAE": 1, "gen VAE": 2, "ends": 3}, True)) == {
        "gen VAE"
    }


def test_what_is_compared_is_drawn_at_random_without_repetition():
    rows = np.arange(1000)[:, None]
    some = generation_scores._some(rows, 300, "test images")[:, 0]
    assert len(set(some)) == 300
    assert 420 < some.mean() < 580  # from everywhere: six standard errors about 499.5
    np.testing.assert_array_equal(generation_scores._some(rows, 300, "test images")[:, 0], some)
    np.testing.assert_array_equal(generation_scores._some(rows, 1000, "test images"), rows)


def test_bytes_are_rounded_and_clipped():
    x = jnp.asarray([-0.5, 0.0, 0.49 / 255, 0.51 / 255, 1.0, 1.7])
    np.testing.assert_array_equal(generation_scores.to_bytes(x), [0, 0, 0, 1, 255, 255])


def test_blocks_of_any_size_give_the_whole():
    x = np.arange(7.0)
    for block in (1, 3, 7, 10):
        got = generation_scores._in_blocks(lambda x, y: {"sum": x + y}, [x, 10 * x], block)
        np.testing.assert_array_equal(got["sum"], 11 * x)


@pytest.mark.parametrize(
    ("module", "variant"),
    [
        *((celeba128_generation, variant) for variant in ("", "quick")),
        *((digits_generation, variant) for variant in ("", "quick")),
        *((folder_generation, variant) for variant in ("", "mlp", "quick")),
        *((mnist_generation, variant) for variant in ("", "quick", "codes", "images")),
        *((rendered64_generation, variant) for variant in ("", "quick")),
    ],
)
def test_every_config_can_be_meant(module, variant):
    config = module.get_config(variant)
    generation.check(config)
    shapes = {
        "celeb_a": (128, 128, 3),
        "folder": (config.data.resolution, config.data.resolution, 3),
        "rendered": (64, 64, 3),
        "mnist": (28, 28, 1),
    }
    models = generation_stages.build_models(config, shapes.get(config.data.name, (8, 8, 1)), None)
    for name in ("vae", "vae_balanced", "vae_plus", "wae"):
        assert models[name].latents == models[name].outputs == models["ae"].latents
    assert models["vae_images"].outputs == models["ae"].outputs
    with pytest.raises(ValueError, match="has no variant 'fast'"):
        module.get_config("fast")


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("vae.spaces", ("latents",), "vae.spaces=.* must be among"),
        ("vae.spaces", (), "must list at least one value"),
        ("ae.codes", 0, "ae.codes=0 must be an integer of at least 1"),
        ("ae.network", "resnet", "ae.network='resnet' must be one of"),
        ("ae.network", "conv", "ae.patch=4: .* does not fit patch=4"),
        ("wae.weight", -1.0, "wae.weight=-1.0 must be 0 or"),
        ("vae_plus.gamma", 0.0, "vae_plus.gamma=0.0 must be a finite number above 0"),
        ("balanced.patience", 0.0, "balanced.patience=0.0 must be a finite number above 0"),
        ("balanced.beta2", 1.0, "balanced.beta2=1.0 must lie between 0 and 1"),
        ("flow.epochs", -1, "flow.epochs=-1 must be an integer of at least 0"),
        ("vae.layers", 1, "vae.layers=1 must be an integer of at least 2"),
        ("train.batch_size", 2000, "train.batch_size=2000 is larger than the 1438"),
        ("balanced.batch_size", 2000, "balanced.batch_size=2000 is larger than the 1438"),
        ("flow.batch_size", 2000, "flow.batch_size=2000 is larger than the 1438"),
        ("train.seeds", (-1,), "train.seeds"),
        ("eval.bins", (1,), "eval.bins=.* at least 2"),
        ("eval.bins", (2000,), "needs as many training images as bins, and 1000 are used"),
        ("eval.parts", 300, "eval.parts=300 cuts 250 images into subsets of fewer than 2"),
        ("eval.inception_weights", "/no/such/file", "Inception weights '/no/such/file' cannot"),
    ],
)
def test_bad_fields_are_refused_before_any_work(field, value, sentence, tmp_path):
    config = tiny()
    config.eval.fid = True
    config.vae.spaces, config.flow.epochs = ("balanced codes",), 1
    section, name = field.split(".")
    with config.ignore_type():
        config[section][name] = value
    with pytest.raises(InputError, match=sentence):
        generation.run(config, str(tmp_path / "none"))
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
def test_fid_is_measured_only_in_inceptions_features(finished, monkeypatch):
    """Its features and weights replaced, as no test downloads them: what they are given counts."""
    path, _ = finished
    config, seen = tiny(), []
    config.eval.fid = True
    session = session_of(config, path)

    def features(params, images, block):
        seen.append((params, images.shape[1:], images.dtype))
        return images.reshape(len(images), 8, 8).astype(float).mean(2)

    monkeypatch.setattr(inception_weights, "load_params", lambda weights: "weights")
    monkeypatch.setattr(inception, "inception_features", features)
    scorer = generation_scores.Scorer(session)
    got = scorer(scorer.test, "gen_")
    means = [x.reshape(-1, 8, 8).astype(float).mean(2) for x in (scorer.test, scorer.reference)]
    moments = [part for x in means for part in (x.mean(0), np.cov(x.T))]
    assert got["gen_fid"] == pytest.approx(frechet_distance(*moments), rel=1e-9)
    assert set(seen) == {("weights", (8, 8, 1), np.dtype(np.uint8))}
    assert scorer.about()["fid_protocol"] == inception.PROTOCOL


@pytest.mark.slow
def test_absent_weights_leave_the_reason_in_place_of_fid(finished, monkeypatch):
    path, rows = finished
    config = tiny()
    config.eval.fid = True

    def absent(weights):
        raise InputError("cannot be had: download them")

    monkeypatch.setattr(inception_weights, "load_params", absent)
    scorer = generation_scores.Scorer(session_of(config, path))
    about = scorer.about()
    assert about["without_fid"] == "cannot be had: download them"
    assert "fid" not in scorer.features
    said = generation_report.protocol(config, [rows[0] | about], load("digits"))["scores"]
    assert "No FID: cannot be had: download them." in said


def row(method, seed, fd, ndb):
    return {
        "method": method, "seed": seed, "data": "mnist", "gen_fd": fd, "rec_fd": fd / 2,
        "gen_fd_se": 0.1, "gen_fd_extrapolated": fd,
        "gen_ndb_20": ndb, "rec_ndb_20": ndb, "gen_js_20": ndb,
    }  # fmt: skip


def some_rows(plus=(3.0, 4.0)):
    scores = {"VAE": (8.0, 9.0), "VAE+": plus, "WAE-MMD": (3.5, 4.5)}
    rows = [row("held-out images", None, 1.0, 0.05), row("Downsample", None, 2.0, 0.05)]
    return rows + [
        row(method, seed, fd, min(fd / 10, 1.0))
        for method, each in scores.items()
        for seed, fd in enumerate(each)
    ]


def test_the_sentence_says_better_only_where_intervals_are_apart():
    said = generation_report.sentence(some_rows())
    assert "VAE+ 3.50 ± 0.71" in said
    assert "Against VAE, VAE+ is better in FD (classifier), NDB/20." in said
    assert "Against WAE-MMD, VAE+ is not told apart in FD (classifier), NDB/20." in said
    worse = generation_report.sentence(some_rows((20.0, 21.0)))
    assert "Against VAE, VAE+ is worse in FD (classifier)" in worse


def test_of_one_seed_the_interval_is_one_measurements_error():
    (one,) = [each for each in some_rows() if each["method"] == "VAE+" and each["seed"] == 0]
    assert generation_report.interval([one], "gen_fd") == pytest.approx((2.9, 3.1))
    error = np.sqrt(0.3 * 0.7 / 20)  # of a share of 20 bins
    expected = (0.3 - error, 0.3 + error)
    assert generation_report.interval([one], "gen_ndb_20") == pytest.approx(expected)


def test_the_papers_values_stand_beside_ours_only_on_its_data():
    rows = some_rows()
    header, _ = tables.ndb_table(rows)
    assert "paper" not in header
    for each in rows:
        each["data"] = "celeb_a"
        each |= {"gen_ndb_100": 0.5, "rec_ndb_100": 0.5, "gen_js_100": 0.5}
    header, body = tables.ndb_table(rows)
    beside = {line[0]: line[header.index("paper")] for line in body}
    assert beside == {
        **{"held-out images": "–", "Downsample": "0.05"},
        **{"VAE": "0.88", "VAE+": "0.29", "WAE-MMD": "0.64"},
    }
    header, body = tables.frechet_table(rows)
    assert dict(zip(header, body[-1], strict=True))["paper"] == "66.9"  # the last: of samples


@pytest.mark.slow
def test_incompatible_codes_are_refused_in_one_sentence(finished):
    path, _ = finished
    session, nets = generation.load_pipeline(tiny(), str(path), 0)
    with pytest.raises(ValueError, match=r"decode was given shape \(2, 3\) .* takes \[B, 4\]"):
        generation_scores.generate(session, nets, jnp.zeros((2, 3)), jnp.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"encode was given shape \(2, 4\) .* takes \[B, 64\]"):
        stages.encode(session.models["ae"], nets["ae"], jnp.zeros((2, 4)))
