"""The command `vaebal`: what it takes, prints and leaves behind."""

import sys

import numpy as np
import pytest

from vaebal import __main__ as cli
from vaebal import command_line
from vaebal.errors import InputError
from vaebal.estimator import rows


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs `vaebal ARGUMENTS` here; (exit code, stdout, stderr)."""
    monkeypatch.setattr(command_line, "speak_anywhere", lambda: None)
    monkeypatch.setattr(command_line, "leave_on_interrupt", lambda **_: None)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["vaebal", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        return ended.value.code, said.out, said.err

    return run


def test_help_names_every_command(capsys):
    cli.main(["vaebal", "--help"])
    said = capsys.readouterr().out
    for name in ("fit", "diagnose", "run", "bench"):
        assert f"vaebal {name}" in said


def test_a_command_that_is_none_is_told(command):
    code, _, said = command("fti", "data.npy")
    assert code == 2
    assert said.startswith("error: there is no command 'fti'.")


def test_data_that_are_not_there_are_told(command, tmp_path):
    code, _, said = command("fit", tmp_path / "data.npy", f"--out={tmp_path / 'model.npz'}")
    assert code == 2
    assert "data.npy does not exist: give an array" in said


def test_a_model_is_never_overwritten(command, tmp_path):
    out = tmp_path / "model.npz"
    out.write_bytes(b"mine")
    code, _, said = command("fit", "data.npy", f"--out={out}")
    assert (code, out.read_bytes()) == (2, b"mine")
    assert "exists: name another file" in said


@pytest.mark.parametrize("command_of", ["fit", "diagnose"])
def test_a_place_where_nothing_can_be_written_is_told_before_any_work(
    command, tmp_path, monkeypatch, command_of
):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(rows, "read", None)  # would fail if called
    monkeypatch.setattr(rows, "from_archive", None)
    place = tmp_path / "file" / "x.npz"
    flag = {"fit": f"--out={place}", "diagnose": f"--json={place}"}[command_of]
    code, _, said = command(command_of, "data.npz", flag)
    assert code == 2
    assert "cannot be written" in said
    assert "name another place" in said


def test_a_fit_keeps_its_model_and_passes_every_flag_on(command, tmp_path, monkeypatch):
    given = {}

    class Made:
        dimension_, gamma_, error_, certificate_ = 2, 0.1, 0.2, None

        def save(self, path):
            path.write_bytes(b"model")

    def fit(data, **flags):
        given.update(flags, data=data)
        return Made()

    monkeypatch.setattr("vaebal.estimator.fit", fit)
    out = tmp_path / "m.npz"
    flags = f"--out={out}", "--budget=3", "--max-latents=5", "--seed=7", f"--path={tmp_path}"
    code, said, _ = command("fit", "d.npy", *flags, "--no-cache")
    assert (code, out.read_bytes()) == (0, b"model")
    assert said.startswith("dimension 2, gamma 0.1, held-out error 0.2")
    path = str(tmp_path)
    expected = {"data": "d.npy", "budget": 3.0, "max_latents": 5, "seed": 7, "path": path}
    assert given == expected


def test_bad_data_are_one_sentence_of_the_command_too(command, tmp_path):
    np.save(tmp_path / "nan.npy", np.full((20, 3), np.nan))
    code, _, said = command("fit", tmp_path / "nan.npy", f"--out={tmp_path / 'model.npz'}")
    assert code == 2
    assert "Input X contains NaN. Leave those samples out" in said
    np.savez(tmp_path / "o.npz", x=np.ones((9, 2)), x_hat=np.ones((9, 2)), mean=np.ones((9, 2)),
             log_var=np.ones((9, 2)), gamma=1.0)  # fmt: skip
    code, _, said = command("diagnose", tmp_path / "o.npz")
    assert code == 2
    assert "x has 9 examples; give at least" in said
    assert len(said.strip().splitlines()) == 1


def test_outputs_of_a_vae_are_diagnosed(command, tmp_path):
    """Two of four latents on a plane, at Theorem 1's optimum; the same with one switched off."""
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(20, 2)))[0]
    variances, gamma = np.array([1.0, 0.5]), 1e-3
    scores = rng.normal(size=(2000, 2)) * np.sqrt(variances - gamma)
    x = scores @ basis.T + np.sqrt(gamma) * rng.normal(size=(2000, 20))
    mean, log_var = np.zeros((2000, 4)), np.zeros((2000, 4))
    mean[:, :2] = x @ basis * np.sqrt(variances - gamma) / variances
    log_var[:, :2] = np.log(gamma / variances)
    x_hat = mean[:, :2] * np.sqrt(variances - gamma) @ basis.T
    file = tmp_path / "outputs.npz"
    np.savez(file, x=x, x_hat=x_hat, mean=mean, log_var=log_var, gamma=gamma)
    report = tmp_path / "report.json"
    code, said, _ = command("diagnose", file, f"--json={report}")
    assert code == 0
    assert said.startswith("balanced")
    assert report.stat().st_size > 100
    code, _, refused = command("diagnose", file, f"--figure={tmp_path / 'a.foo'}")
    assert code == 2
    assert "must end with one of" in refused
    assert command("diagnose", file, "--kl-weight=1e-3")[0] == 2  # the file says gamma

    # The same model by its loss: gamma is beta / 2 beside a sum over pixels, beta D / 2 a mean's.
    np.savez(file, x=x, x_hat=x_hat, mean=mean, log_var=log_var)
    for weight, pixels in ((2 * gamma, ()), (2 * gamma, ("sum",)), (2 * gamma / 20, ("mean",))):
        flags = f"--kl-weight={weight}", *(f"--pixels={each}" for each in pixels)
        said = command("diagnose", file, *flags)[1]
        assert said.startswith("balanced")
        assert "implied by the loss" in said
    assert command("diagnose", file, f"--kl-weight={2 * gamma / 20}")[1].startswith("under")
    code, _, refused = command("diagnose", file, "--pixels=mean")
    assert (code, "--pixels=mean says of --kl-weight" in refused) == (2, True)
    for flag in ("--gamma=1", "--json=a.json"):
        code, _, refused = command("diagnose", tmp_path, flag)
        assert (code, "means nothing for a run: leave it out" in refused) == (2, True)

    mean[:, 1] = log_var[:, 1] = 0
    x_hat = mean[:, :2] * np.sqrt(variances - gamma) @ basis.T
    np.savez(file, x=x, x_hat=x_hat, mean=mean, log_var=log_var, gamma=gamma)
    assert command("diagnose", file)[1].startswith("over-regularized")


def test_an_array_that_is_missing_is_named(command, tmp_path):
    file = tmp_path / "outputs.npz"
    np.savez(file, x=np.zeros((5, 2)), mean=np.zeros((5, 1)))
    code, _, said = command("diagnose", file)
    assert code == 2
    assert "has no array" in said
    code, _, said = command("diagnose", tmp_path / "nothing.npz")
    assert (code, "is no .npz file" in said) == (2, True)


def test_only_the_rows_are_read_of_an_archive(tmp_path):
    """Names beside them, which NumPy keeps as Python objects, are let be."""
    X = np.arange(6.0).reshape(3, 2)
    np.savez(tmp_path / "named.npz", x=X, names=np.array(["a", None], object))
    np.testing.assert_array_equal(rows.read(tmp_path / "named.npz"), X)
    np.savez(tmp_path / "two.npz", a=X, b=X)
    with pytest.raises(InputError, match="holds the arrays a, b: name the one to fit 'x'"):
        rows.read(tmp_path / "two.npz")


@pytest.mark.parametrize("of", ["fit", "diagnose"])
def test_an_archive_cut_short_is_told(command, tmp_path, of):
    whole = tmp_path / "whole.npz"
    np.savez(whole, x=np.zeros((20, 3)))
    for size in (0, 10, 100, whole.stat().st_size - 5):
        file = tmp_path / "cut.npz"
        file.write_bytes(whole.read_bytes()[:size])
        code, _, said = command(of, file)
        assert code == 2
        assert f"{file} is no .npz file, or not the whole of one" in said
