"""The command `vaebal`: fit, diagnose, run, bench. Nothing is imported that a command needs not."""

import argparse
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from vaebal import command_line
from vaebal.errors import InputError

ABOUT = """\
vaebal fit DATA            a VAE in balance on your data: an .npy, .npz or .csv file, or a folder of
                           images; says how many latents it needs, and keeps the model
vaebal diagnose OUTPUTS    is your VAE collapsed, crowded or balanced? an .npz file with the arrays
                           x, x_hat, mean and log_var (or variance), and if at hand x_hat_sampled;
                           or the folder of a finished run of ours: every VAE in it
vaebal run --config=NAME   an experiment, as python main.py does; --help lists its flags
vaebal bench --what=step   how fast it is; --help lists its flags

vaebal fit --help and vaebal diagnose --help say more."""


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command of `argv` and exits with its code."""
    argv = sys.argv if argv is None else list(argv)
    match argv[1:2]:
        case ["run"]:
            from vaebal.run import main as run

            run([argv[0], *argv[2:]])
        case ["bench"]:
            sys.argv = [argv[0], *argv[2:]]
            runpy.run_module("vaebal.bench", run_name="__main__")
        case ["fit" | "diagnose" as command]:
            command_line.speak_anywhere()
            given = (_fit_arguments if command == "fit" else _diagnose_arguments)(argv[2:])
            command_line.leave_on_interrupt(goes_on=bool(getattr(given, "path", None)))
            sys.exit(command_line.exit_code(lambda: (_fit, _diagnose)[command != "fit"](given)))
        case ["--help" | "-h"] | []:
            print(ABOUT)
        case _:
            print(f"error: there is no command {argv[1]!r}.\n\n{ABOUT}", file=sys.stderr)
            sys.exit(InputError.exit_code)


def _fit_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("vaebal fit", description="A VAE in balance on your data.")
    parser.add_argument("data", help=".npy, .npz or .csv file [N, D], or a folder of images")
    parser.add_argument("--out", help="where the model is kept; default: DATA's name, .vae.npz")
    parser.add_argument("--budget", type=float, help="minutes, about; default: until it is done")
    parser.add_argument("--max-latents", type=int, help="at most so many; default: found out")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--path", help="a folder for an interrupted fit to go on from")
    parser.add_argument("--no-cache", action="store_true", help="keep no compiled programs")
    return parser.parse_args(argv)


def _fit(given: argparse.Namespace) -> None:
    out = Path(given.out or f"{Path(given.data.rstrip('/')).stem}.vae.npz")
    if out.exists():
        raise InputError(f"--out={out} exists: name another file, or move that one.")
    command_line.require_folder("out", out.parent)
    if given.path:
        command_line.require_folder("path", Path(given.path).expanduser())
    if not given.no_cache:
        command_line.keep_compiled()
    from vaebal.estimator import fit

    arguments = {name: getattr(given, name) for name in ("budget", "max_latents", "seed", "path")}
    vae = fit(given.data, **arguments)
    vae.save(out)
    print(f"dimension {vae.dimension_}, gamma {vae.gamma_:.4g}, held-out error {vae.error_:.4g}")
    if vae.certificate_ is not None:
        print(f"{vae.certificate_.verdict}: {vae.certificate_.advice}")
    print(f"{out}: vaebal.load({str(out)!r}) reads it")


def _diagnose_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("vaebal diagnose", description="Is your VAE balanced?")
    parser.add_argument(
        "outputs", help=".npz file: x, x_hat, mean, log_var (or variance); or a run's --workdir"
    )
    parser.add_argument("--gamma", type=float, help="decoder variance, if not in the file as gamma")
    parser.add_argument(
        "--kl-weight", type=float, help="or the weight of the KL in the loss, beside the error's 1"
    )
    parser.add_argument(
        "--pixels", choices=("sum", "mean"),
        help="with it: whether the error is summed over an example's pixels, or a mean over them, "
        "as F.mse_loss is; default: sum",
    )  # fmt: skip
    parser.add_argument("--json", help="a file for every number")
    parser.add_argument("--figure", help="a file for the picture, .png or .pdf")
    return parser.parse_args(argv)


def _diagnose(given: argparse.Namespace) -> None:
    if given.pixels and given.kl_weight is None:
        raise InputError(f"--pixels={given.pixels} says of --kl-weight: give that too.")
    if Path(given.outputs).is_dir():
        _diagnose_run(given)
        return
    from vaebal.estimator.rows import from_archive

    for name in ("json", "figure"):
        if file := getattr(given, name):
            command_line.require_folder(name, Path(file).parent)
    if given.figure:
        from matplotlib.figure import Figure

        kinds = sorted(Figure().canvas.get_supported_filetypes())
        if Path(given.figure).suffix[1:] not in kinds:
            raise InputError(f"--figure={given.figure} must end with one of {', '.join(kinds)}.")
    path = Path(given.outputs)
    if not path.is_file() or path.suffix != ".npz":
        raise InputError(f"{path} is no .npz file: write one with np.savez(path, x=x, x_hat=...).")
    held = from_archive(path)
    missing = {"x", "x_hat", "mean"} - held.keys() or (
        {"log_var"} - held.keys() if "variance" not in held else set()
    )
    if missing:
        raise InputError(f"{path} has no array {sorted(missing)[0]!r}: it holds {sorted(held)}.")
    from vaebal.diagnosis import diagnose

    gamma = given.gamma if given.gamma is not None else held.get("gamma")
    loss = {"kl_weight": given.kl_weight, "pixels": given.pixels or "sum"}
    names = ("x", "x_hat", "mean", "log_var", "variance", "x_hat_sampled")
    certificate = diagnose(
        **{name: held[name] for name in names if name in held},
        gamma=None if gamma is None else float(gamma),
        loss=None if given.kl_weight is None else loss,
    )
    print(certificate)
    if given.json:
        Path(given.json).write_text(certificate.json())
    if given.figure:
        certificate.figure().savefig(given.figure)


def _diagnose_run(given: argparse.Namespace) -> None:
    for name in ("gamma", "kl_weight", "json", "figure"):
        if getattr(given, name) is not None:
            raise InputError(f"--{name.replace('_', '-')} means nothing for a run: leave it out.")
    command_line.keep_compiled()
    from vaebal.experiments import verdicts

    found = []
    for name, certificate in verdicts.of_run(given.outputs):
        print(f"{name}: {certificate.verdict}", flush=True)
        found.append((name, certificate))
    print(f"\n{verdicts.write(given.outputs, found)}")


if __name__ == "__main__":
    main()
