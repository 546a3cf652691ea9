"""What a user meets at the command line."""

import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import digits_kappa, theorem1
from vaebal import __main__ as cli
from vaebal import homotopy
from vaebal.data import load
from vaebal.errors import CheckpointError, Diverged, InputError
from vaebal.experiments import checks, run, shipped, verdicts
from vaebal.experiments.kappa_sweep import run as kappa_sweep
from vaebal.models import init_params
from vaebal.run import found
from vaebal.units import to_unit_pixels

ROOT = Path(__file__).parent.parent


def tiny(**changes) -> ConfigDict:
    """The digits sweep made so small that it trains in seconds."""
    config = digits_kappa.get_config()
    fields = {
        "model.kappas": (2, 3),
        "model.skips": ("residual+affine", "none"),
        "model.width": 8,
        "train.seeds": (0, 1),
        "train.epochs": 3,
        "train.epochs_per_chunk": 2,
        "train.epochs_per_checkpoint": 2,
        "eval.nll_samples": 3,
        "eval.pictures": 3,
    }
    config.update_from_flattened_dict(fields | changes)
    return config


def main(*arguments, workdir=None, **environment):
    command = [sys.executable, str(ROOT / "main.py"), *arguments]
    command += [f"--workdir={workdir}"] if workdir else []
    return subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, timeout=300,
        env={**os.environ, "JAX_PLATFORMS": "cpu", **environment}, check=False,
    )  # fmt: skip


def test_a_bad_argument_is_one_sentence_and_exit_code_2(tmp_path):
    """Of a whole program; tests/test_command_line.py has the sentences."""
    done = main("--config.model.kappas=(0,)", workdir=tmp_path / "run")
    assert done.returncode == 2, done.stderr
    assert done.stderr == "error: model.kappas=(0,) must be integers of at least 1.\n"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("model.kappas", (0,), "model.kappas=(0,) must be integers of at least 1"),
        ("model.kappas", (), "model.kappas=() must list at least one value"),
        ("model.kappas", (3, 3), "none twice"),
        ("model.skips", ("diagonal",), "model.skips=('diagonal',) must be among"),
        ("model.encoder_layers", 1, "model.encoder_layers=1"),
        ("model.activation", "rely", "model.activation='rely' must be one of"),
        ("model.gamma", 0.0, "model.gamma=0.0 must be a finite number above 0"),
        ("model.gamma", -1.0, "model.gamma=-1.0"),
        ("train.gamma_rule", "fast", "train.gamma_rule='fast'"),
        ("train.beta2", 1.0, "train.beta2=1.0 must lie between 0 and 1"),
        ("train.gamma_rate", float("nan"), "train.gamma_rate=nan"),
        ("train.learning_rate", 0.0, "train.learning_rate=0.0"),
        ("train.batch_size", 0, "train.batch_size=0 must be an integer"),
        ("train.batch_size", 5000, "larger than the 1438 training images"),
        ("train.stack", "some", "train.stack='some' must be one of 'auto', 'all', 'none'"),
        ("model.products", "float16", "model.products='float16' must be one of"),
        ("train.epochs", 0, "train.epochs=0"),
        ("train.seeds", (-1,), "train.seeds=(-1,)"),
        ("eval.nll_samples", 0, "eval.nll_samples=0"),
        ("experiment", "kapa_sweep", "'kapa_sweep' does not exist: did you mean 'kappa_sweep'?"),
        ("model.log_var_init", float("nan"), "model.log_var_init=nan must be a finite number"),
    ],
)
def test_bad_fields_are_named_before_any_training(refused, field, value, said):
    refused(run, tiny(**{field: value}), said)


def test_unknown_data_is_named(tmp_path):
    with pytest.raises(InputError, match=r"data\.name=.digit. is not a known data set"):
        run(tiny(**{"data.name": "digit"}), str(tmp_path))


def test_an_unwritable_workdir_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        run(tiny(), str(tmp_path / "file" / "run"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One tiny sweep, run once for the tests below."""
    path = tmp_path_factory.mktemp("sweep") / "run"
    return path, run(tiny(), str(path))


def test_a_sweep_leaves_rows_table_and_figures(finished):
    path, rows = finished
    assert [(r["skips"], r["kappa"], r["seed"]) for r in rows] == [
        (skips, kappa, seed)
        for skips in ("residual+affine", "none")
        for kappa in (2, 3)
        for seed in (0, 1)
    ]
    assert json.loads((path / "rows.json").read_text()) == rows
    assert len((path / "rows.csv").read_text().splitlines()) == 1 + len(rows)
    for name in ("sweep.png", "pictures.png"):
        assert (path / name).read_bytes().startswith(b"\x89PNG")
    table = (path / "table.md").read_text()
    for said in ("2 seeds 0, 1", "3 epochs", "S = 3", "all 359 test images", '"width": 8', "jax"):
        assert said in table
    assert len(list((path / "tensorboard").iterdir())) == len(rows)


def test_rows_are_consistent(finished):
    """Identities between a row's numbers, each within its stated error."""
    _, rows = finished
    for row in rows:
        # With one draw each, gamma d / 2 (log 2 pi gamma) + error / 2 gamma + KL is -ELBO.
        nats = row["error_sampled"] / (2 * row["gamma"]) + 32 * np.log(2 * np.pi * row["gamma"])
        assert nats + row["kl"] == pytest.approx(row["negative_elbo"], rel=1e-4)
        assert row["nll"] < row["negative_elbo"] + 4 * row["negative_elbo_se"]
        assert row["gamma_residual"] == pytest.approx(
            row["gamma"] - row["error_sampled"] / 64, rel=1e-3
        )
        assert len(row["kl_per_dimension"]) == row["kappa"]
        assert sum(row["kl_per_dimension"]) == pytest.approx(row["kl"], rel=1e-5)
        assert row["informative"] <= row["kappa"]
        assert row["active_0.001"] >= row["active_0.01"] >= row["active_0.1"]
        assert row["test_images"] == 359


def test_a_second_start_does_nothing_again(finished, monkeypatch, capsys):
    path, rows = finished
    monkeypatch.setattr(kappa_sweep, "make_program", None)  # would fail if called
    assert run(tiny(), str(path)) == rows
    assert capsys.readouterr().out.count("finished before") == 1


def test_an_unfinished_member_alone_is_done_again(finished):
    """A lost row comes back from the checkpoint, equal but for the time it took."""
    path, rows = finished
    lost = path / "members" / "none_kappa3_seed1" / "row.json"
    lost.unlink()
    again = run(tiny(), str(path))
    for before, after in zip(rows, again, strict=True):
        assert {k: v for k, v in before.items() if k != "train_seconds"} == {
            k: v for k, v in after.items() if k != "train_seconds"
        }


def test_a_member_that_stops_is_named_and_the_others_are_reported(finished, tmp_path, monkeypatch):
    """With one seed of kappa = 3 without skips spoiled; its row holds no number."""
    member = kappa_sweep.Member
    spoiled = lambda seed, kappa, gamma, **skips: member(  # noqa: E731
        seed, kappa, gamma if (seed, kappa) != (1, 3) or skips["affine"] else float("nan"), **skips
    )
    config, path = tiny(), tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(kappa_sweep, "Member", spoiled)
        with pytest.raises(Diverged) as error:
            run(config, str(path))
    said = str(error.value)
    assert "none_kappa3_seed1 (step 0). Lower train.learning_rate" in said
    held = json.loads((path / "members" / "none_kappa3_seed1" / "row.json").read_text())
    assert held == {"skips": "none", "kappa": 3, "seed": 1, "stopped": 0}
    rows = json.loads((path / "rows.json").read_text())
    assert len(rows) == len(finished[1]) - 1
    for row, whole in zip(rows, finished[1], strict=False):
        assert row["nll"] == pytest.approx(whole["nll"], rel=1e-6)
    lines = (path / "table.md").read_text().splitlines()
    below = 2 + max(i for i, line in enumerate(lines) if line.startswith("|"))
    assert lines[below] == said

    monkeypatch.setattr(kappa_sweep, "make_program", None)  # would fail if called
    with pytest.raises(Diverged) as error:
        run(config, str(path))
    assert str(error.value) == said


@pytest.mark.slow
def test_a_sweep_of_which_nothing_is_left_ends_in_a_sentence_and_exit_code_1(tmp_path):
    flags = ["--config.model.gamma=1e-39", "--config.model.kappas=(2,)", "--config.model.width=8"]
    done = main(*flags, "--config.model.skips=('none',)", workdir=tmp_path / "run")
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    for seed in (0, 1, 2):
        assert f"none_kappa2_seed{seed} (step 0)" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "run" / "table.md").exists()


def test_another_config_is_refused(finished):
    path, _ = finished
    with pytest.raises(InputError, match=r"train.epochs=3, and this one has train.epochs=4"):
        run(tiny(**{"train.epochs": 4}), str(path))


@pytest.mark.parametrize(
    "config", ["{}/mnist_gamma.py", "nowhere/mnist_gamma.py", "~/arena.py:hard"]
)
def test_a_file_of_another_folder_is_never_taken_for_one_of_ours(config, tmp_path):
    """Whoever copies a config and mistypes its folder would get ours, unsaid."""
    config = config.format(tmp_path)
    name = config.split("/")[-1].partition(":")[0]
    assert Path(found(config)).parent != shipped.folder()
    assert name in found(config)
    for ours in ("mnist_gamma", "mnist_gamma.py", "configs/mnist_gamma.py"):
        assert Path(found(ours).partition(":")[0]).exists()


def test_help_lists_the_flags():
    said = main("--help").stdout
    assert all(f"--{name}" in said for name in ("config", "workdir", "[no]cache", "num_processes"))


def test_a_finished_member_can_be_loaded(finished):
    from vaebal.experiments.kappa_sweep.run import load_member
    from vaebal.measures.evaluation import posterior

    path, rows = finished
    model, params = load_member(tiny(), str(path), "none", 3, 1)
    got = posterior(model, params, load("digits").test, seed=1, block=1000, kappa=3)
    assert got.squared_error_mean.mean() == pytest.approx(rows[-1]["error_mean"], rel=1e-6)
    with pytest.raises(InputError, match="not a member"):
        load_member(tiny(), str(path), "none", 4, 1)


def test_every_vae_of_a_finished_run_gets_its_verdict(finished, tmp_path, capsys):
    path = tmp_path / "run"
    shutil.copytree(finished[0], path)
    found = list(verdicts.of_run(str(path)))
    names = [f"{s}, κ = {k}, seed {n}" for s in ("residual + affine skips", "no skips")
             for k in (2, 3) for n in (0, 1)]  # fmt: skip
    assert [name for name, _ in found] == names
    variance = np.asarray(to_unit_pixels(load("digits").test)).var(0).sum()
    for (_, certificate), row in zip(found, finished[1], strict=True):
        evidence = certificate.evidence
        assert (evidence.samples, evidence.pixels, evidence.latents) == (359, 64, 3)
        assert evidence.gamma == pytest.approx(row["gamma"], rel=1e-6)
        unexplained = row["error_mean"] / variance
        assert evidence.unexplained.value == pytest.approx(unexplained, rel=1e-3)
    cli._diagnose(cli._diagnose_arguments([str(path)]))
    assert f"{names[0]}: {found[0][1].verdict}" in capsys.readouterr().out
    table = (path / "verdicts.md").read_text()
    assert all(f"| {name} " in table and found[0][1].verdict in table for name in names)


def test_what_is_no_run_of_vaes_is_not_judged(finished, tmp_path):
    for content, said in (
        (None, "holds no run"),
        (theorem1.get_config(), "'theorem1', which keeps no VAEs"),
    ):
        if content is not None:
            (tmp_path / "config.json").write_text(content.to_json())
        with pytest.raises(InputError, match=said):
            list(verdicts.of_run(str(tmp_path)))
    path = tmp_path / "stopped"
    shutil.copytree(finished[0], path)
    for row in path.glob("members/*/row.json"):
        row.write_text(json.dumps(json.loads(row.read_text()) | {"stopped": 2}))
    with pytest.raises(InputError, match="has no VAE to be judged: none reconstructs"):
        list(verdicts.of_run(str(path)))
    path = tmp_path / "half"
    shutil.copytree(finished[0], path)
    next(path.glob("members/*/row.json")).unlink()
    with pytest.raises(CheckpointError, match="is missing: the same command makes it anew"):
        list(verdicts.of_run(str(path)))


def test_a_finished_member_is_loaded_as_it_was_trained_or_not_at_all(finished, tmp_path):
    """Another config's activation, an older epoch, and rows without their config."""
    from vaebal.experiments.kappa_sweep.run import load_member

    path = tmp_path / "run"
    shutil.copytree(finished[0], path)
    with pytest.raises(InputError, match=r"model\.activation='silu', and this one has model\.act"):
        load_member(tiny(**{"model.activation": "relu"}), str(path), "none", 3, 1)
    load_member(tiny(**{"train.epochs_per_chunk": 1}), str(path), "none", 3, 1)
    for newest in (path / "checkpoints").glob("*/3"):
        shutil.rmtree(newest)
    with pytest.raises(CheckpointError, match=r"/3 of epoch 3, .* is not there \(of \[2\] are\)"):
        load_member(tiny(), str(path), "none", 3, 1)
    (path / "config.json").unlink()
    with pytest.raises(InputError, match=r"has no config\.json, but holds"):
        run(tiny(**{"model.activation": "relu"}), str(path))


def test_other_images_under_a_finished_run_are_refused(finished, monkeypatch):
    """They would be trained on, and their counts put beside numbers of the old ones."""
    images = load("digits")
    more = dataclasses.replace(images, train=np.concatenate([images.train, images.test[:1]]))
    monkeypatch.setattr("vaebal.experiments.inputs.load", lambda *_, **__: more)
    said = r"other data \(name digits, training images 1438, .*\(name digits, training images 1439,"
    with pytest.raises(InputError, match=said):
        run(tiny(), str(finished[0]))


@pytest.mark.parametrize("linear", [False, True])
def test_the_variance_above_the_priors_grows_as_the_config_says(linear):
    """sigma^2 = 1 + a, or e^a, where the encoder says a = 4 of x = 0 by its heads' biases."""
    config = tiny(**{"model.linear_variance": linear, "model.log_var_init": 4.0})
    model = kappa_sweep.build_model(config, 64, 3, "none")
    params = init_params(model, jax.random.key(0), jnp.zeros(64))
    heads = jax.tree.map(jnp.zeros_like, params["encoder"]) | {
        name: layer for name, layer in params["encoder"].items() if "log_var" in name
    }
    _, log_var = model.apply(
        {"params": params | {"encoder": heads}}, jnp.zeros((1, 64)), method="encode"
    )
    np.testing.assert_allclose(log_var, np.log(5.0) if linear else 4.0, rtol=1e-6)


@pytest.mark.slow
def test_alone_or_stacked_members_agree(finished, tmp_path, capsys):
    """Equal up to rounding over the sweep's few steps; one kappa and seed of each suffice."""
    from vaebal.data import load
    from vaebal.experiments.kappa_sweep.run import load_member
    from vaebal.measures.evaluation import posterior

    _, rows = finished
    config, path = tiny(), tmp_path / "run"
    config.train.stack, config.train.seeds, config.model.kappas = "none", (1,), (3,)
    rows = [row for row in rows if (row["seed"], row["kappa"]) == (1, 3)]
    again = run(config, str(path))
    assert "2 members, one program per member; 3 epochs each" in capsys.readouterr().out
    assert len(list((path / "checkpoints").iterdir())) == len(rows) == 2
    for here, there in zip(again, rows, strict=True):
        assert here["error_mean"] == pytest.approx(there["error_mean"], rel=1e-3)
        assert here["nll"] == pytest.approx(there["nll"], rel=1e-3)
    model, params = load_member(config, str(path), "none", 3, 1)
    assert not {"affine", "affine_gate"} & set(params)
    got = posterior(model, params, load("digits").test, seed=1, block=1000, kappa=3)
    assert got.squared_error_mean.mean() == pytest.approx(again[-1]["error_mean"], rel=1e-6)


def tiny_flags():
    flags = [f"--config.{k}={v}" for k, v in tiny().to_dict().items() if isinstance(v, str)]
    for group in ("model", "train", "eval"):
        flags += [f"--config.{group}.{k}={v}" for k, v in tiny()[group].items()]
    return flags


@pytest.mark.slow
def test_eight_devices_train_as_one(finished, tmp_path):
    """Four members on 4 × 2 virtual devices; the numbers are those of one."""
    done = main(
        *tiny_flags(),
        workdir=tmp_path / "run",
        XLA_FLAGS=f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8",
    )
    assert done.returncode == 0, done.stderr
    assert "8 × cpu" in done.stdout
    sharded = json.loads((tmp_path / "run" / "rows.json").read_text())
    for one, eight in zip(finished[1], sharded, strict=True):
        assert eight["error_mean"] == pytest.approx(one["error_mean"], rel=1e-3)
        assert eight["nll"] == pytest.approx(one["nll"], rel=1e-3)


@pytest.mark.slow
def test_two_processes_report_every_member_once(finished, tmp_path):
    """Two members of each stack in either; one writes and prints for both."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    processes = [
        subprocess.Popen(
            [
                *(sys.executable, ROOT / "main.py", *tiny_flags(), f"--workdir={tmp_path / 'run'}"),
                *("--distributed", f"--coordinator_address={address}"),
                *("--num_processes=2", f"--process_id={index}"),
            ],
            cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for index in (0, 1)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=300) for process in processes]
        assert [process.returncode for process in processes] == [0, 0], said
    finally:
        for process in processes:
            process.kill()
    assert said[0][0].count("2 × cpu (cpu); workdir") == 1
    # Gloo, which links the processes, prints from C++ whatever Python does with its output.
    assert [line for line in said[1][0].splitlines() if not line.startswith("[Gloo]")] == []
    rows = json.loads((tmp_path / "run" / "rows.json").read_text())
    assert len(rows) == len(finished[1])
    for one, two in zip(finished[1], rows, strict=True):
        assert (one["skips"], one["kappa"], one["seed"]) == (
            two["skips"],
            two["kappa"],
            two["seed"],
        )
        for name in ("error_mean", "nll"):
            assert two[name] == pytest.approx(one[name], rel=1e-3)
    events = [len(list(each.iterdir())) for each in (tmp_path / "run" / "tensorboard").iterdir()]
    assert events == [1] * len(rows)


@pytest.mark.parametrize(("members", "sharing"), [(4, 2), (3, 8), (8, 1)])
def test_a_batch_must_suit_the_devices_that_share_it_and_no_others(monkeypatch, members, sharing):
    """Of eight; the stack takes as many of them as divide it."""
    config, images = tiny(**{"train.batch_size": 3 * sharing}), load("digits")
    monkeypatch.setattr(jax, "devices", lambda: range(8))
    monkeypatch.setattr(
        jax, "make_mesh",
        lambda shape, axes, **_: SimpleNamespace(shape=dict(zip(axes, shape, strict=True))),
    )  # fmt: skip
    checks.batch_size(config, images, members)
    if sharing > 1:
        config.train.batch_size += 1
        said = rf"batch_size={3 * sharing + 1} must be a multiple of the {sharing} devices"
        with pytest.raises(InputError, match=said):
            checks.batch_size(config, images, members)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("closed_form", homotopy.closed_form(0.01)),
        ("adam", homotopy.gradient(0.01, 64)),
        ("fixed", homotopy.fixed()),
    ],
)
def test_gamma_moves_by_the_rule_that_the_config_names(name, expected):
    config = tiny(**{"train.gamma_rule": name, "train.gamma_rate": 0.01})
    rule, seen = (
        kappa_sweep._rule(config, 64, None),
        homotopy.Seen(jnp.asarray(0), jnp.asarray(0.1)),
    )
    state = rule.init(1.0, 3, jax.random.key(0))
    other = expected.init(1.0, 3, jax.random.key(0))
    for _ in range(3):
        state, other = rule.update(seen, state), expected.update(seen, other)
    assert float(state.log_gamma) == float(other.log_gamma)
