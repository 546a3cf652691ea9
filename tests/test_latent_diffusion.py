"""Latent diffusion in miniature: what its cells are, that they resume, and what its page says."""

import json
import shutil

import matplotlib.pyplot as plt
import numpy as np
import pytest

from configs import latent_diffusion
from vaebal.data import ImageSet
from vaebal.diagnosis import implied_gamma
from vaebal.errors import InputError
from vaebal.experiments import verdicts
from vaebal.experiments.latent_diffusion import page, run, scores, stages
from vaebal.experiments.latent_diffusion.stages import CLASSIFIER, First, Prior
from vaebal.generation import classifier
from vaebal.training import member_params

ARMS = ("kl 1e-6", "adaptive", "none", "kl 1e-6 as adaptive")


def tiny():
    """Two seeds of four small autoencoders and priors of a few steps on the digits."""
    config = latent_diffusion.get_config("quick")
    config.model.latents, config.model.width = 4, 8
    config.train.arms, config.train.seeds = ARMS, (0, 1)
    config.train.batch_size = config.prior.batch_size = config.classifier.batch_size = 256
    config.train.epochs, config.train.adaptive_epochs = 4, 2
    config.prior.stages = ("flow 8", "invertible 8", "vae 8")
    config.prior.blocks, config.prior.epochs = 1, (1, 3)
    config.prior.warmup_steps = 2
    config.classifier.features, config.classifier.width, config.classifier.epochs = 6, 16, 3
    config.eval.parts, config.eval.pictures, config.eval.block = 2, 3, 200
    return config


def without_times(rows):
    return [{k: v for k, v in row.items() if k != "train_seconds"} for row in rows]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A workdir of the tiny run, and its rows."""
    path = tmp_path_factory.mktemp("finished")
    return path, run.run(tiny(), str(path))


@pytest.mark.slow
def test_its_vaes_are_those_that_the_rows_tell_of(finished):
    """A plain autoencoder has no variance to be judged by."""
    path, rows = finished
    first = {f"{r['arm']}, seed {r['seed']}": r for r in rows if "stage" not in r}
    found = list(run.trained(tiny(), str(path)))
    assert len(found) == 2 * (len(ARMS) - ("none" in ARMS))
    for vae in found:
        x, x_hat, *_ = verdicts.outputs(vae, np.asarray(vae.rows))
        error = np.square(x - x_hat).sum(1).mean()
        assert error == pytest.approx(first[vae.name]["error"], rel=1e-4)


@pytest.mark.slow
def test_every_arm_has_the_gamma_and_the_latents_that_it_names(finished):
    path, rows = finished
    first = {(r["arm"], r["seed"]): r for r in rows if "stage" not in r}
    for seed in (0, 1):
        opened = first["opening", seed]["open"]
        for arm in ("kl 1e-6", "kl 1e-6 as adaptive"):
            # 1e-6 KL + |x - x_hat|^2 in pixels of [-1, 1], which is 4 times that in [0, 1].
            gamma = implied_gamma(1e-6, factor=4.0)
            assert first[arm, seed]["gamma"] == pytest.approx(gamma, rel=1e-5)
        assert first["kl 1e-6", seed]["latents"] == first["none", seed]["latents"] == 4
        assert first["adaptive", seed]["latents"] <= opened
        assert first["kl 1e-6 as adaptive", seed]["latents"] == opened
        assert first["none", seed]["error"] == first["none", seed]["error_sampled"]
        assert first["none", seed].get("fd_normal") is None
    assert (path / "steps.png").stat().st_size > 1000
    told = [r for r in rows if "ndb" in r]
    assert len(told) == 8  # the first second stage's ends
    assert all(
        0 <= r["ndb"] <= 1 and r["ndb"] * 20 == pytest.approx(round(r["ndb"] * 20)) for r in told
    )
    assert "latent diffusion in miniature on digits" in (path / "table.md").read_text()


@pytest.mark.slow
def test_a_run_that_lost_its_last_cells_ends_as_it_was(finished, tmp_path):
    path, rows = finished
    shutil.copytree(path, tmp_path / "run")
    lost = [*(tmp_path / "run" / "runs").glob("prior*"), tmp_path / "run/runs/adaptive_seed1"]
    for folder in [*lost, *(tmp_path / "run" / "checkpoints").glob("prior*")]:
        shutil.rmtree(folder)
    assert without_times(run.run(tiny(), str(tmp_path / "run"))) == without_times(rows)


@pytest.mark.slow
def test_judging_a_prior_on_the_way_changes_nothing(finished, tmp_path):
    """After three epochs it is the same whether it was judged after one or not."""
    path, rows = finished
    shutil.copytree(path, tmp_path / "run")
    for folder in [
        *(tmp_path / "run").glob("runs/prior*"),
        *(tmp_path / "run").glob("checkpoints/prior*"),
    ]:
        shutil.rmtree(folder)
    config = tiny()
    config.prior.epochs = (3,)
    kept = json.loads((path / "config.json").read_text())
    kept["prior"]["epochs"] = [3]
    (tmp_path / "run/config.json").write_text(json.dumps(kept))
    again = without_times(run.run(config, str(tmp_path / "run")))
    assert again == [row for row in without_times(rows) if row.get("after") != 1]


def test_of_data_without_labels_the_features_tell_how_far_images_were_turned(tmp_path):
    """Three epochs on an edge that is dark above: a guess is wrong in three of four."""
    config = tiny()
    config.train.seeds, config.train.batch_size, config.classifier.batch_size = (0,), 32, 32
    config.classifier.learning_rate = 1e-2
    rng = np.random.default_rng(0)
    edge = np.repeat(np.linspace(0.2, 0.8, 8), 8)
    rows = (255 * (edge + 0.05 * rng.normal(size=(480, 64)))).clip(0, 255).astype(np.uint8)
    images = ImageSet("folder", rows[:400], rows[400:], (8, 8, 1))
    session = stages.Session(config, tmp_path, images, classifier.targets_of(images))
    program = session.program(CLASSIFIER.name, [CLASSIFIER])
    schedule = session.schedule([CLASSIFIER])
    state, _ = program.run(program.init(), schedule.epochs * schedule.steps)
    params = member_params(state, 0)
    row, _ = scores.evaluate(session, scores.Scorer(session), CLASSIFIER, params, state)
    assert session.targets.kind == "turns"
    assert row["wrong"] < 0.1


def test_where_images_may_not_be_shown_the_figure_holds_samples_alone():
    config, images = tiny(), ImageSet("folder", np.zeros((4, 64)), np.zeros((4, 64)), (8, 8, 1))
    some = np.zeros((3, 64), np.uint8)
    pictures = {
        First("adaptive", 0): {"images": some, "rec": some, "normal": some},
        Prior("adaptive", 0, "flow 8", 3): {"samples": some},
    }
    made = ["N(0, I) decoded, adaptive", "prior's, adaptive"]
    for only, said in ((False, ["test images", "reconstructed, adaptive", *made]), (True, made)):
        config.eval.samples_only = only
        figure = page.draw_samples(config, pictures, images)
        told = [text.get_text() for axis in figure.axes for text in axis.texts]
        assert [text.replace("\n", " ") for text in told] == said
        plt.close(figure)


def test_more_bins_than_images_are_refused_before_any_work(tmp_path):
    config = tiny()
    config.eval.bins = 2000
    with pytest.raises(InputError, match=r"eval\.bins=2000 needs as many training images as bins"):
        run.run(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_the_effective_rank_counts_equal_variances():
    rng = np.random.default_rng(0)
    draws = rng.normal(size=(50_000, 3))
    assert scores.effective_rank(draws) == pytest.approx(3, rel=1e-3)
    assert scores.effective_rank(draws[:, :1] * np.ones(4)) == pytest.approx(1, abs=1e-3)
    assert scores.effective_rank(draws[:, :1]) == 1
    shares = np.array([0.5, 0.25, 0.25])
    rank = np.exp(-(shares * np.log(shares)).sum())
    assert scores.effective_rank(draws * np.sqrt(shares)) == pytest.approx(rank, rel=1e-2)


def test_overtaking_is_measured_in_the_other_arms_steps():
    rows = [
        {"arm": arm, "seed": seed, "stage": "flow 8", "steps": steps, "fd": fd}
        for arm, seed, fds in (
            ("kl", 0, (9.0, 5.0, 4.0, 4.5)), ("ours", 0, (8.0, 3.9, 3.0, 2.0)),
            ("kl", 1, (9.0, 5.0, 4.0, 3.0)), ("ours", 1, (8.0, 6.0, 5.0, 4.0)),
        )
        for steps, fd in zip((10, 20, 40, 80), fds, strict=True)
    ]  # fmt: skip
    assert page.overtaken(rows, "ours", "kl", "flow 8") == [0.5, None]


def test_a_first_second_stage_that_stopped_early_is_told_of_as_far_as_it_came():
    config, arms = tiny(), ("kl 1e-6", "adaptive")
    rows = {
        First(arm, 0): {"arm": arm, "seed": 0, "fd_rec": 2.0, "fd_held_out": 1.0} for arm in arms
    }
    for stage, after, fd in (("flow 8", 1, 7.0), ("vae 8", 1, 9.0), ("vae 8", 3, 8.0)):
        for arm in arms:
            cell = Prior(arm, 0, stage, after)
            rows[cell] = cell._asdict() | {
                "fd": fd, "steps": 6 * after, "parameters": 5, "train_seconds": 1.0
            }  # fmt: skip
    assert "of 'flow 8' after 6 steps: kl 1e-6 7" in page.sentence(config, rows)
    header, body = page.prior_table(config, page.prior_rows(rows))
    assert header[3:5] == ["6", "18"]
    assert [line[3:5] for line in body] == [["7.00", ""]] * 2 + [["9.00", "8.00"]] * 2
    # Seconds are those of both legs, as the second went on from the first.
    assert [line[-1] for line in body] == ["", "", "2", "2"]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("train.arms", ("kl",), "an arm is"),
        ("train.arms", ("kl -1",), "an arm is"),
        ("train.arms", ("kl 1e-6 as adaptive",), "no 'adaptive' to count latents"),
        ("train.adaptive_epochs", 600, "must be below train.epochs"),
        ("prior.epochs", (3, 1), "must rise"),
        ("eval.bins", 1, "eval.bins=1 must be an integer of at least 2"),
        ("prior.average", 1.0, "prior.average=1.0 must lie between 0 and 1"),
        ("train.weight_decay", -1.0, "train.weight_decay=-1.0 must be 0 or a finite number"),
        ("prior.stages", ("gan 8",), "one of 'flow WIDTH', 'invertible WIDTH', 'vae WIDTH'"),
        ("prior.stages", ("flow",), "prior.stages holds 'flow'"),
        ("prior.stages", ("flow 0",), "prior.stages holds 'flow 0'"),
    ],
)
def test_fields_that_cannot_be_meant_are_named(field, value, message):
    config = latent_diffusion.get_config("quick")
    section, name = field.split(".")
    config[section][name] = value
    with pytest.raises(InputError, match=message):
        run.check(config)
