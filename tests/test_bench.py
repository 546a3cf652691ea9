"""The benchmark: its counting, its turns, its table, and that PyTorch trains the same network."""

import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import digits_kappa
from vaebal import bench
from vaebal.errors import InputError
from vaebal.models import init_params, latent_noise
from vaebal.training import loss_and_terms

ROOT = Path(__file__).parent.parent


@pytest.fixture
def torch():
    torch = pytest.importorskip("torch")
    # Left on, it would flush NumPy's denormals for the tests that follow.
    yield torch
    assert np.float32(1e-30) * np.float32(1e-10) > 0


def perturbed(model, seed=0):
    """Parameters with nothing at zero, where an error in a gradient could hide."""
    params = init_params(model, jax.random.key(seed), jnp.full(model.outputs, 0.3))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    noise = [0.1 * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, [a + b for a, b in zip(leaves, noise, strict=True)])


def test_model_flops_are_those_counted_by_hand(small_vae):
    """D = 16, K = 5, W = 12; two hidden encoder layers, two decoder blocks."""
    params = init_params(small_vae(), jax.random.key(0), jnp.zeros(16))
    encoder = 16 * 12 + 12 * 12 + 2 * 12 * 5
    decoder = 5 * 12 + 4 * 12 * 12 + 12 * 16 + 5 * 16
    assert bench.decoder_flops(params) == 2 * decoder
    assert bench.step_flops(params) == 6 * (encoder + decoder) - 2 * 16 * 12


def test_model_flops_agree_with_the_compilers(small_vae):
    """XLA counts activations, loss and bias gradients too: a few per cent at width 256."""
    model = small_vae(outputs=128, latents=32, width=256)
    params = init_params(model, jax.random.key(0), jnp.zeros(128))
    x, eps = jnp.zeros((64, 128)), jnp.zeros((64, 32))
    step = jax.jit(jax.grad(lambda params: loss_and_terms(model, params, x, eps)[0]))
    counted = step.lower(params).compile().cost_analysis()["flops"] / len(x)
    assert 1.0 <= counted / bench.step_flops(params) < 1.05


def test_contestants_take_turns(monkeypatch):
    """On a clock that only work moves: seconds are exact, turns alternate and fill the window."""
    clock, turns = [0.0], []
    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock[0])

    def work(name, seconds):
        def run(count):
            turns.append((name, count))
            clock[0] += count * seconds

        return run

    works = {"a": work("a", 0.25), "b": work("b", 2.0)}
    taken = bench.take_turns(works, repeats=3, window=1.0)
    np.testing.assert_allclose(taken["a"], [0.25] * 3, rtol=1e-12)
    np.testing.assert_allclose(taken["b"], [2.0] * 3, rtol=1e-12)
    assert turns[-6:] == [("a", 4), ("b", 1)] * 3
    assert turns[:-6] == [("a", 1)] * 2 + [("b", 1)] * 2  # warm-up


def test_spread_is_median_minimum_maximum():
    assert bench.spread([3.0, 1.0, 2.0, 9.0, 0.5]) == (2.0, 0.5, 9.0)


def results(**changes):
    spread = bench.Spread
    step = bench.Step(
        256,
        {bench.OURS: spread(9450, 9200.4, 9600), bench.EAGER: spread(8990, 8900, 9000)},
        spread(0.761, 0.75, 0.8),
        {bench.OURS: 2.34},
        spread(1.051, 1.03, 1.06),
    )
    fields = {
        "title": "a net",
        "machine": [("CPU", "a processor, 2 cores")],
        "matrix_size": 4096,
        "peaks": {"JAX": spread(2.5e11, 2.4e11, 2.6e11)},
        "flops_per_image": 20_438_720,
        "steps": [step],
        "nll": spread(77000.0, 76000.0, 78000.0),
        "nll_utilisation": spread(0.9, 0.8, 0.95),
        "nll_text": "10 images, S = 2, blocks of 10",
        "notes": ["A note."],
    }
    return bench.Results(**(fields | changes))


def table_below(text, heading):
    """The cells of the table under a heading, header first."""
    lines = iter(text.split(heading, 1)[1].splitlines())
    rows = [line for line in lines if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows if "--" not in row]


def test_table_holds_the_numbers():
    text = bench.render(results())
    header, line = table_below(text, "## The training step")
    assert dict(zip(header, line, strict=True)) == {
        "batch": "256",
        "vaebal, images/s": "9,450 (9,200–9,600)",
        "PyTorch eager, images/s": "8,990 (8,900–9,000)",
        "of peak": "0.76 (0.75–0.80)",
        "compile vaebal, s": "2.3",
        "vaebal / best PyTorch": "1.05 (1.03–1.06)",
    }
    assert "| JAX     | 250 (240–260) |" in text
    assert "77,000 (76,000–78,000) samples of z per second (10 images" in text
    assert "20,438,720" in text
    assert text.endswith("A note.\n")


def test_table_leaves_out_what_was_not_measured():
    step = results().steps[0]
    alone = step._replace(rates={bench.OURS: step.rates[bench.OURS]}, ratio=None)
    text = bench.render(results(steps=[alone]))
    header, _ = table_below(text, "## The training step")
    assert header == ["batch", "vaebal, images/s", "of peak", "compile vaebal, s"]
    assert "PyTorch trains" not in text
    compiled = step._replace(
        batch_size=64,
        rates=step.rates | {bench.COMPILED: step.rates[bench.EAGER]},
        compile_seconds=step.compile_seconds | {bench.COMPILED: 20.0},
    )
    header, first, second = table_below(
        bench.render(results(steps=[compiled, step])), "## The training step"
    )
    assert [row[header.index("compile torch.compile, s")] for row in (first, second)] == [
        "20.0",
        "–",
    ]
    assert second[header.index("torch.compile, images/s")] == "–"


def test_machine_is_described_without_naming_it():
    text = " ".join(f"{name} {value}" for name, value in bench.describe_machine())
    assert jax.__version__ in text
    assert "cores" in text
    assert os.uname().nodename not in text
    assert str(ROOT) not in text


def test_what_others_use_is_told():
    """A child's work is another's, this process's own is not."""
    burn = "import time\nwhile time.process_time() < 1.5: pass"
    others = bench.watch_others()
    if np.isnan(others()):
        pytest.skip("no /proc/stat here")
    start = time.perf_counter()
    with subprocess.Popen([sys.executable, "-c", burn]):
        while time.perf_counter() - start < 1:
            pass
        with_child = others() * os.cpu_count()
    assert with_child > 0.2
    # Other tests may run beside this one, so there is no upper bound but the machine.
    assert with_child <= 1.05 * os.cpu_count()


def tiny_run(**changes):
    config = digits_kappa.get_config()
    config.model.width, config.model.encoder_layers, config.model.decoder_blocks = 8, 2, 1
    options = {
        "kappa": 3,
        "batch_sizes": (8,),
        "repeats": 2,
        "window": 0.0,
        "matrix_size": 16,
        "images": 20,
        "nll_images": 6,
        "nll_samples": 2,
        "with_compile": False,
    }
    return bench.run(config, **(options | changes))


def check_tiny(measured, contestants):
    (step,) = measured.steps
    assert set(step.rates) == contestants
    spreads = [*step.rates.values(), *measured.peaks.values(), step.utilisation, measured.nll]
    assert all(0 < s.low <= s.median <= s.high < np.inf for s in spreads)
    assert step.compile_seconds[bench.OURS] > 0
    assert "8×8 pixels" in bench.render(measured)


def test_tiny_run_without_torch():
    measured = tiny_run(with_torch=False)
    check_tiny(measured, {bench.OURS})
    assert measured.steps[0].ratio is None
    assert any("PyTorch was left out" in note for note in measured.notes)


def test_tiny_run_with_torch(torch):
    measured = tiny_run()
    check_tiny(measured, {bench.OURS, bench.EAGER})
    assert measured.steps[0].ratio.median > 0
    assert "torch.compile was left out." in measured.notes
    assert any(name == "PyTorch" for name, _ in measured.machine)


def test_failing_compiler_is_left_out(torch, monkeypatch, capsys):
    def broken(net, **options):
        raise RuntimeError("no C++ compiler in /some/where")

    monkeypatch.setattr(torch, "compile", broken)
    measured = tiny_run(with_compile=True)
    check_tiny(measured, {bench.OURS, bench.EAGER})
    assert "torch.compile failed at batch 8: left out." in measured.notes
    assert "/some/where" not in bench.render(measured) + capsys.readouterr().err


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"residual": False, "affine_skip": False},
        {"gamma": 0.3},
        {"activation": jax.nn.relu},
        {"activation": jax.nn.gelu},
        {"activation": jax.nn.softplus},
        {"activation": jax.nn.tanh},
    ],
    ids=["full", "no skips", "fixed gamma", "relu", "gelu", "softplus", "tanh"],
)
def test_torch_net_is_the_same_function(torch, small_vae, pixels, changes):
    """Loss to 1e-5 and every gradient to 1e-4 of its norm, on our parameters and noise."""
    model = small_vae(**changes)
    params = perturbed(model)
    eps = latent_noise(jax.random.key(2), len(pixels), model.latents)
    loss, gradients = jax.value_and_grad(
        lambda params: loss_and_terms(model, params, pixels, eps)[0]
    )(params)
    with bench.torch_at_its_best() as torch:
        net = bench.torch_vae(torch, model, params)
        net_loss = net(torch.tensor(pixels), torch.tensor(np.asarray(eps)))
        net_loss.backward()
    np.testing.assert_allclose(net_loss.item(), loss, rtol=1e-5)
    compared = 0
    for name, parameter in net.named_parameters():
        *path, last = name.split(".")
        ours = gradients
        for part in path:
            ours = ours[part]
        ours = ours["kernel"].T if last == "weight" else ours[last]
        difference = np.linalg.norm(parameter.grad.numpy() - ours)
        assert difference <= 1e-4 * np.linalg.norm(ours), name
        compared += 1
    assert compared == len(jax.tree.leaves(params))


def test_torch_steps_learn(torch, small_vae, pixels):
    """The loop that is timed does train: every parameter moves, and the loss falls."""
    config = digits_kappa.get_config()
    config.train.batch_size = 32
    model = small_vae()
    params = perturbed(model)
    with bench.torch_at_its_best() as torch:
        net = bench.torch_vae(torch, model, params)
        before = {name: p.detach().clone() for name, p in net.named_parameters()}
        x, eps = torch.tensor(pixels), torch.zeros(len(pixels), model.latents)
        first = net(x, eps).item()
        images = (255 * pixels).astype(np.uint8)
        bench.torch_training(torch, net, config=config, images=images)(20)
        assert net(x, eps).item() < first
        assert all(not torch.equal(p, before[name]) for name, p in net.named_parameters())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kappa": 0}, "--kappa must be 1 or more, not 0"),
        ({"repeats": 0}, "--repeats must be 1 or more"),
        ({"batch_sizes": (8, 0)}, "--batch must be 1 or more, not 0"),
        ({"batch_sizes": ()}, "--batch must be 1 or more"),
    ],
)
def test_bad_arguments_are_refused_before_measuring(changes, said):
    with pytest.raises(InputError, match=said):
        tiny_run(**changes)


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("--batch=64,many", "--batch: 'many' is not an integer"),
        ("--config=configs/nothing.py", "configs/nothing.py"),
        ("--out=LICENSE/bench", "--out=LICENSE/bench cannot be written"),
    ],
)
def test_command_line_answers_bad_input_in_one_sentence(argument, said):
    done = subprocess.run(
        [sys.executable, "-m", "vaebal.bench", argument],
        capture_output=True, text=True, cwd=ROOT, timeout=300,
        env={**os.environ, "JAX_PLATFORMS": "cpu"}, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if "xla_bridge" not in line]
    assert len(lines) == 1, done.stderr
    assert said in lines[0]
