"""The benchmark: its counting, its turns, its tables, and that PyTorch trains the same network."""

import math
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags

from configs import celeba64_gamma, digits_kappa, mnist_gamma, network_gamma, theorem1
from vaebal.bench import __main__ as command
from vaebal.bench import feeding, metrics, page, pytorch, scaling, step, subjects, sweep, timing
from vaebal.bench.flops import decoder_flops, forward_flops, step_flops
from vaebal.bench.machine import describe_machine, watch_others
from vaebal.bench.timing import Spread, Turns
from vaebal.data import Scenes
from vaebal.errors import InputError
from vaebal.models import conv_vae, infogan_vae, init_params, latent_noise
from vaebal.models.nets import PRODUCTS
from vaebal.training.vae import loss_and_terms

ROOT = Path(__file__).parent.parent
BRIEF = Turns(repeats=2, window=0.0)


@pytest.fixture
def torch():
    torch = pytest.importorskip("torch")
    # Left on, it would flush NumPy's denormals for the tests that follow.
    yield torch
    assert np.float32(1e-30) * np.float32(1e-10) > 0


# ---- Counting ----


def perturbed(model, seed=0):
    """Parameters with nothing at zero, where an error in a gradient could hide."""
    params = init_params(model, jax.random.key(seed), jnp.full(model.outputs, 0.3))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    noise = [0.1 * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, [a + b for a, b in zip(leaves, noise, strict=True)])


def small_conv_vae():
    return conv_vae(
        image_shape=(16, 16, 3), latents=5, patch=2, width=8, blocks=1, activation=jax.nn.silu,
        residual=True, affine_skip=True,
    )  # fmt: skip


def test_dense_model_flops_are_those_counted_by_hand(small_vae):
    """D = 16, K = 5, W = 12; two hidden encoder layers, two decoder blocks."""
    encoder = 16 * 12 + 12 * 12 + 2 * 12 * 5
    decoder = 5 * 12 + 4 * 12 * 12 + 12 * 16 + 5 * 16
    assert decoder_flops(small_vae()) == 2 * decoder
    assert step_flops(small_vae()) == 6 * (encoder + decoder) - 2 * 16 * 12


def test_convolutional_model_flops_are_those_counted_by_hand():
    """16 px in patches of 2: grids of 8 and 4, of 8 and 16 channels, a block at each."""
    blocks = 64 * 2 * 9 * 8 * 8 + 16 * 2 * 9 * 16 * 16
    encoder = 64 * 12 * 8 + 16 * 32 * 16 + blocks + 2 * 256 * 5
    decoder = 5 * 256 + 16 * 16 * 32 + blocks + 64 * 9 * 8 * 12 + 5 * 768
    assert decoder_flops(small_conv_vae()) == 2 * decoder
    assert sum(forward_flops(small_conv_vae()).values()) == 2 * (encoder + decoder)
    assert step_flops(small_conv_vae()) == 6 * (encoder + decoder)  # centred: no layer is spared


@pytest.mark.parametrize("kind", ["dense", "conv", "infogan", "pooled"])
def test_model_flops_agree_with_the_compilers(small_vae, kind):
    """XLA counts activations, loss and bias gradients too: a few per cent."""
    model = {
        "dense": lambda: small_vae(outputs=128, latents=32, width=256),
        "conv": lambda: conv_vae(
            image_shape=(16, 16, 3), latents=8, patch=2, width=64, blocks=1,
            activation=jax.nn.relu, residual=True, affine_skip=True,
        ),
        "infogan": lambda: infogan_vae(
            image_shape=(16, 16, 3), latents=8, activation=jax.nn.relu, affine_skip=True
        ),
        "pooled": lambda: small_vae(
            outputs=768, latents=32, width=256, image_shape=(16, 16, 3), pool=2
        ),
    }[kind]()  # fmt: skip
    mean = jnp.zeros(model.outputs)
    params = jax.eval_shape(lambda: init_params(model, jax.random.key(0), mean))
    x, eps = jnp.zeros((8, model.outputs)), jnp.zeros((8, model.latents))
    gradient = jax.jit(jax.grad(lambda params: loss_and_terms(model, params, x, eps)[0]))
    counted = gradient.lower(params).cost_analysis()["flops"] / len(x)
    assert 1.0 <= counted / step_flops(model) < 1.08


def test_a_steps_products_alone_are_the_model_flops(small_vae):
    model = small_vae()
    params = init_params(model, jax.random.key(0), jnp.zeros(model.outputs))
    products, factors = step.products_alone(params, 32)
    counted = jax.jit(products).lower(factors).cost_analysis()["flops"]
    assert counted == 32 * step_flops(model)


@pytest.mark.parametrize("kind", PRODUCTS)
def test_products_are_taken_as_the_config_says(small_vae, monkeypatch, kind):
    """Float32 is exact, which an accelerator's own way with it is not; the peak's too."""
    params = init_params(small_vae(), jax.random.key(0), jnp.zeros(16))
    products, factors = step.products_alone(params, 4, PRODUCTS[kind])
    text = str(jax.make_jaxpr(products)(factors))
    assert ("HIGHEST" in text) == (kind == "float32")
    assert ("bf16" in text) == (kind == "bfloat16")
    seen = []
    monkeypatch.setattr(timing, "product", lambda a, b, products: seen.append(products) or a)
    step._peaks(None, 4, PRODUCTS[kind], BRIEF)
    assert seen == [PRODUCTS[kind]]
    assert kind in pytorch.PRECISIONS


@pytest.mark.parametrize(
    ("config", "name", "shape"),
    [
        (mnist_gamma, "mnist", (28, 28, 1)), (mnist_gamma, "fashion_mnist", (28, 28, 1)),
        (mnist_gamma, "digits", (8, 8, 1)), (network_gamma, "network", (8, 8, 3)),
        (celeba64_gamma, "celeb_a", (64, 64, 3)), (celeba64_gamma, "folder", (64, 64, 3)),
        (digits_kappa, "digits", (8, 8, 1)),
    ],
)  # fmt: skip
def test_random_images_have_the_shape_of_the_configs_data(config, name, shape):
    config = config.get_config()
    config.data.name = name
    assert subjects.image_shape(config) == shape


@pytest.mark.parametrize(
    ("flops", "expected"),
    [
        (1, (100, 81)),  # cheap: an epoch of 8192 images, and not more
        (10**6, (100, 10)),  # ten steps in the time
        (10**7, (12, subjects.LEAST_STEPS)),  # dear: batches of an eighth
    ],
)
def test_an_epoch_fits_its_time(flops, expected):
    assert subjects.epoch_size(100, flops, peak=1e9, aim=1.0) == expected


# ---- Turns ----


def test_contestants_take_turns(monkeypatch):
    """On a clock that only work moves: seconds are exact, turns alternate and fill the window."""
    clock, turns = [0.0], []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])

    def work(name, seconds):
        def run(count):
            turns.append((name, count))
            clock[0] += count * seconds

        return run

    works = {"a": work("a", 0.25), "b": work("b", 2.0)}
    taken = timing.take_turns(works, repeats=3, window=1.0)
    np.testing.assert_allclose(taken["a"], [0.25] * 3, rtol=1e-12)
    np.testing.assert_allclose(taken["b"], [2.0] * 3, rtol=1e-12)
    assert turns[-6:] == [("a", 4), ("b", 1)] * 3
    assert turns[:-6] == [("a", 1)] * 2 + [("b", 1)] * 2  # warm-up


def test_spread_is_median_minimum_maximum():
    assert timing.spread([3.0, 1.0, 2.0, 9.0, 0.5]) == (2.0, 0.5, 9.0)


def test_exponents_of_powers_are_found_turn_by_turn():
    """Three turns of exact power laws, of other speeds and exponents."""
    sizes = np.array([100, 200, 400, 1600])
    powers, speeds = np.array([2.0, 1.0, 1.9]), np.array([1e-6, 3e-4, 5e-6])
    taken = speeds[None, :] * sizes[:, None] ** powers[None, :]
    np.testing.assert_allclose(timing.growth_exponent(sizes, taken), (1.9, 1.0, 2.0), rtol=1e-12)


def test_noise_moves_an_exponent_as_least_squares_says():
    """Errors of 10 % at five sizes: the slope's own is 10 % over the norm of the centred logs."""
    sizes, rng = 2.0 ** np.arange(5), np.random.default_rng(0)
    taken = sizes[:, None] ** 1.5 * np.exp(0.1 * rng.normal(size=(5, 4000)))
    found = [timing.growth_exponent(sizes, taken[:, [i]]).median for i in range(4000)]
    expected = 0.1 / (math.log(2) * math.sqrt(10))
    np.testing.assert_allclose(np.std(found), expected, rtol=0.05)
    np.testing.assert_allclose(np.mean(found), 1.5, atol=5 * expected / math.sqrt(4000))


def test_growth_is_measured_at_every_size(monkeypatch):
    """Work that moves a clock by the square of its size."""
    clock = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])

    def work(size):
        def run(count):
            clock[0] += count * 1e-3 * size**2

        return run, size, 10 * size

    grown = metrics.climb(metrics.Ladder("q", "n", (1, 2, 4), work, "images"), BRIEF)
    np.testing.assert_allclose([s.median for s in grown.seconds], [1e-3, 4e-3, 16e-3])
    np.testing.assert_allclose(grown.exponent, (2.0, 2.0, 2.0))
    np.testing.assert_allclose(grown.rate, (2500.0,) * 3)  # 40 images in 16 ms
    text = page.render(metrics.page([grown]), [], math.nan)
    assert "1 · 2 · 4 | 1.00 ms · 4.00 ms · 16.0 ms | n^2.00 (2.00–2.00)" in text
    assert "2,500 (2,500–2,500) images/s" in text


@pytest.mark.parametrize(("members", "rungs"), [(1, [1]), (8, [1, 2, 4, 8]), (6, [1, 2, 4, 6])])
def test_a_ladder_ends_at_its_last_rung(members, rungs):
    assert sweep.ladder(members) == rungs


# ---- Tables ----


def results(**changes):
    measured = step.Step(
        256,
        {step.OURS: Spread(9450, 9200.4, 9600), step.EAGER: Spread(8990, 8900, 9000)},
        Spread(0.761, 0.75, 0.8),
        {step.OURS: 2.34},
        Spread(1.051, 1.03, 1.06),
        dict(zip(step.PIECES, (Spread(0.8, 0.79, 0.81), Spread(0.05, 0.04, 0.06)), strict=True)),
    )
    fields = {
        "name": "net",
        "title": "a net",
        "machine": [("PyTorch", "2 threads")],
        "matrix_size": 4096,
        "products": "tensorfloat32",
        "peaks": {"JAX": Spread(2.5e11, 2.4e11, 2.6e11)},
        "flops_per_image": 20_438_720,
        "steps": [measured],
        "nll": Spread(77000.0, 76000.0, 78000.0),
        "nll_utilisation": Spread(0.9, 0.8, 0.95),
        "nll_text": "10 images, S = 2, blocks of 10",
        "notes": ["A note."],
    }
    return step.Results(**(fields | changes))


def rendered(measured, others=math.nan):
    return page.render(step.page(measured), [("CPU", "a processor, 2 cores")], others)


def table_below(text, heading):
    """The cells of the table under a heading, header first."""
    lines = text.split(heading, 1)[1].lstrip().splitlines()
    rows = lines[: next(i for i, line in enumerate(lines) if not line.startswith("|"))]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows if "--" not in row]


def test_table_holds_the_numbers():
    text = rendered(results())
    header, line = table_below(text, "## The training step")
    assert dict(zip(header, line, strict=True)) == {
        "batch": "256",
        "vaebal, images/s": "9,450 (9,200–9,600)",
        "PyTorch eager, images/s": "8,990 (8,900–9,000)",
        "of peak": "0.76 (0.75–0.80)",
        "compile vaebal, s": "2.3",
        "vaebal / best PyTorch": "1.05 (1.03–1.06)",
    }
    header, line = table_below(text, "### Where a step's time goes")
    assert line == ["256", "0.80 (0.79–0.81)", "0.05 (0.04–0.06)", "0.15", "0.95"]
    assert "| JAX     | 250 (240–260) |" in text
    assert "77,000 (76,000–78,000) samples of z per second (10 images" in text
    assert "20,438,720" in text
    assert "product in tensorfloat32" in text
    assert ["PyTorch", "2 threads"] in table_below(text, "# a net")
    assert text.endswith("A note.\n")


def test_table_leaves_out_what_was_not_measured():
    (both,) = results().steps
    alone = both._replace(rates={step.OURS: both.rates[step.OURS]}, ratio=None, pieces={})
    text = rendered(results(steps=[alone]))
    header, _ = table_below(text, "## The training step")
    assert header == ["batch", "vaebal, images/s", "of peak", "compile vaebal, s"]
    assert "PyTorch trains" not in text
    assert "Where a step" not in text
    compiled = both._replace(
        batch_size=64,
        rates=both.rates | {step.COMPILED: both.rates[step.EAGER]},
        compile_seconds=both.compile_seconds | {step.COMPILED: 20.0},
    )
    header, first, second = table_below(
        rendered(results(steps=[compiled, both])), "## The training step"
    )
    assert [row[header.index("compile torch.compile, s")] for row in (first, second)] == [
        "20.0",
        "–",
    ]
    assert second[header.index("torch.compile, images/s")] == "–"


@pytest.mark.parametrize(("others", "told"), [(0.02, False), (0.4, True), (math.nan, False)])
def test_a_busy_machine_is_told_of(others, told):
    text = rendered(results(), others)
    assert ("machine was busy" in text) == told
    assert ("Used by other processes" in text) == (others == others)


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (12.34, "12.3 s"),
        (1.0, "1.00 s"),
        (0.1234, "123 ms"),
        (5.6e-5, "56.0 µs"),
        (2e-8, "0.0200 µs"),
    ],
)
def test_seconds_read_well(seconds, said):
    assert page.seconds_text(seconds) == said


def feed(pipeline, ratio):
    consumed = Spread(100.0, 90.0, 110.0)
    return feeding.Feed(
        pipeline, 64, "net", "mlp", 100, Spread(*(100 * ratio,) * 3), consumed,
        Spread(ratio, ratio, ratio), consumed,
    )  # fmt: skip


def test_a_pipeline_that_is_too_slow_is_named():
    text = page.render(feeding.page([feed("drawn", 1.5), feed("from disk", 30.0)]), [], math.nan)
    assert "Less than 2 times what the step consumes: drawn at 64 px for net (1.50)." in text
    good = page.render(feeding.page([feed("from disk", 2.0)]), [], math.nan)
    assert "Every pipeline delivers at least 2 times what the step consumes." in good


# ---- The machine ----


def test_machine_is_described_without_naming_it():
    text = " ".join(f"{name} {value}" for name, value in describe_machine())
    assert jax.__version__ in text
    assert "cores" in text
    assert os.uname().nodename not in text
    assert str(ROOT) not in text


def test_what_others_use_is_told():
    """A child's work is another's, this process's own is not."""
    burn = "import time\nwhile time.process_time() < 1.5: pass"
    others = watch_others()
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


# ---- Small runs ----


def tiny(config=digits_kappa):
    config = config.get_config()
    config.model.width, config.train.batch_size = 8, 8
    if "encoder_layers" in config.model:
        config.model.encoder_layers, config.model.decoder_blocks = 2, 1
    return config


def positive(*spreads):
    return all(0 < s.low <= s.median <= s.high < np.inf for s in spreads)


def tiny_step(**changes):
    options = {
        "turns": BRIEF,
        "kappa": 3,
        "batch_sizes": (8,),
        "matrix_size": 16,
        "epoch_seconds": 1e-6,
        "nll_samples": 2,
        "with_compile": False,
    }
    return step.measure(tiny(), **(options | changes))


@pytest.mark.slow
def test_a_step_is_measured():
    measured = tiny_step(with_torch=False)
    (one,) = measured.steps
    assert set(one.rates) == {step.OURS}
    assert one.ratio is None
    assert positive(*one.rates.values(), *measured.peaks.values(), one.utilisation, measured.nll)
    assert one.compile_seconds[step.OURS] > 0
    assert positive(*one.pieces.values())
    assert any("PyTorch was left out" in note for note in measured.notes)
    assert "8×8 pixels" in rendered(measured)


@pytest.mark.slow
def test_the_steps_of_several_configs_make_one_table():
    convolutional = tiny(celeba64_gamma)
    convolutional.data.resolution = 16
    rows = step.measure_many(
        [tiny(network_gamma), convolutional], turns=BRIEF, matrix_size=16, epoch_seconds=1e-6
    )
    assert [row.name for row in rows] == ["network_gamma", "celeba64_gamma"]
    assert all(positive(row.rate, row.utilisation) for row in rows)
    # The rate and its share of the peak differ by one factor, the model FLOPs.
    text = page.render(step.many_page(rows), [], math.nan)
    assert "conv, 8 wide, 16×16" in text
    assert f"{rows[0].flops_per_image / 1e6:,.1f}" in text


@pytest.mark.slow
def test_a_sweep_is_measured(tmp_path):
    measured = sweep.measure(tiny(), turns=BRIEF, members=2, kappa=3, steps=2, with_torch=False)
    assert list(measured.stacked) == [1, 2]
    assert positive(*measured.stacked.values(), *measured.separate.values())
    # One member in one program is a separate run: the same numbers.
    assert measured.factors[1][step.OURS] == (1.0, 1.0, 1.0)
    assert measured.stacked[1] == measured.separate[step.OURS]
    # Two members have two states; the images are shared.
    weights = (64 + 2 * 3) * 8 + 3 * (8 + 64) + 2 * 8 * 8 + 8 * 64
    state = 3 * 4 * weights  # and two moments of each, in float32
    assert measured.memory[2] - measured.memory[1] > state
    _, first, second = table_below(
        page.render(sweep.page(measured), [], math.nan), "## M members in one program"
    )
    assert [first[0], second[0]] == ["1", "2"]
    figure = sweep.draw(measured)
    (drawn,) = figure.axes[0].containers
    scale, _ = sweep._unit(measured)
    np.testing.assert_allclose(
        drawn[0].get_ydata(), [scale * s.median for s in measured.stacked.values()]
    )


def test_scaling_over_one_device_is_told_to_be_none():
    measured = scaling.measure(tiny(), turns=BRIEF, batch_size=8, kappa=3, steps=2)
    assert list(measured.total) == [1]
    assert measured.efficiency[1] == (1.0, 1.0, 1.0)
    assert positive(measured.total[1])
    assert "one device only" in page.render(scaling.page(measured), [], math.nan)


@pytest.mark.slow
def test_feeding_is_measured():
    config = tiny(celeba64_gamma)
    config.model.network, config.data.resolution = "mlp", 8
    (fed,) = feeding.measure(
        [config], turns=BRIEF, matrix_size=16, epoch_seconds=1e-6, disk_bytes=2**12
    )
    assert fed.pipeline == feeding.FROM_DISK
    assert positive(fed.delivered, fed.consumed, fed.ratio, fed.fed)
    assert fed.ratio.low <= fed.delivered.high / fed.consumed.low
    with pytest.raises(InputError, match="network_gamma has no pipeline"):
        feeding.measure([tiny(network_gamma)], turns=BRIEF)


def test_every_batch_is_drawn(monkeypatch):
    """Counted on the host: each batch of factors comes in its turn."""
    seen = []

    class Told(Scenes):
        def __call__(self, factors):
            jax.debug.callback(lambda f: seen.append(f), factors[:, 0])
            return super().__call__(factors)

    monkeypatch.setattr(feeding, "Scenes", Told)
    factors = np.linspace(0, 1, 10, dtype=np.float32)[:, None]
    work, images = feeding.drawing(factors, 8, 4)
    work(3)
    jax.effects_barrier()
    assert images == 4
    np.testing.assert_allclose(
        sorted(np.concatenate(seen)), sorted([*factors[:4, 0]] * 2 + [*factors[4:8, 0]])
    )


# ---- PyTorch ----


@pytest.mark.torch
def test_tiny_run_with_torch(torch):
    measured = tiny_step()
    (one,) = measured.steps
    assert {step.OURS, step.EAGER} <= set(one.rates)
    assert positive(*one.rates.values(), one.ratio)
    assert one.ratio.high <= one.rates[step.OURS].high / one.rates[step.EAGER].low
    assert "torch.compile was left out." in measured.notes
    assert any(name == "PyTorch" for name, _ in measured.machine)


@pytest.mark.torch
def test_separate_runs_are_timed_on_all_threads_and_on_one_for_every_core(torch, monkeypatch):
    monkeypatch.setattr(sweep, "cores", lambda: 3)
    threads, turns = {}, sweep.Turns(1, 0.0)

    def watched(works):
        for name, work in works.items():
            work(1)
            threads[name] = torch.get_num_threads()
        return {name: np.array([6.0]) for name in works}

    monkeypatch.setattr(sweep.Turns, "__call__", lambda _, works: watched(works))
    measured = sweep.measure(tiny(), turns=turns, members=2, kappa=3, steps=2, with_compile=False)
    beside = sweep.SIDE_BY_SIDE.format(step.EAGER)
    assert (threads[step.EAGER], threads[beside]) == (3, 1)
    # Six seconds of two steps: of one run, of two members, of a run on each of three cores.
    taken = {name: spread.median for name, spread in measured.separate.items()}
    assert taken == {step.OURS: 3.0, step.EAGER: 3.0, beside: 1.0}
    assert measured.stacked[2].median == 1.5
    assert measured.factors[2][beside].median == pytest.approx(1.0 / 1.5)


@pytest.mark.torch
def test_failing_compiler_is_left_out(torch, monkeypatch, capsys):
    def broken(net, **options):
        raise RuntimeError("no C++ compiler in /some/where")

    monkeypatch.setattr(torch, "compile", broken)
    measured = tiny_step(with_compile=True)
    assert step.COMPILED not in measured.steps[0].rates
    assert "torch.compile failed at batch 8: left out." in measured.notes
    assert "/some/where" not in rendered(measured) + capsys.readouterr().err


@pytest.mark.torch
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"residual": False, "affine_skip": False},
        {"gamma": 0.3},
        {"linear_variance": True},
        {"activation": jax.nn.relu},
        {"activation": jax.nn.gelu},
        {"activation": jax.nn.softplus},
        {"activation": jax.nn.tanh},
    ],
    ids=["full", "no skips", "fixed gamma", "linear variance", "relu", "gelu", "softplus", "tanh"],
)
def test_torch_net_is_the_same_function(torch, small_vae, pixels, changes):
    """Loss to 1e-5 and every gradient to 1e-4 of its norm, on our parameters and noise."""
    model = small_vae(**changes)
    params = perturbed(model)
    eps = latent_noise(jax.random.key(2), len(pixels), model.latents)
    loss, gradients = jax.value_and_grad(
        lambda params: loss_and_terms(model, params, pixels, eps)[0]
    )(params)
    with pytorch.torch_at_its_best() as torch:
        net = pytorch.torch_vae(torch, model, params)
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


def trained(torch, small_vae, pixels, train):
    """The loop that is timed does train: every weight moves, and the loss falls."""
    model = small_vae()
    net = pytorch.torch_vae(torch, model, perturbed(model))
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    x, eps = torch.tensor(pixels), torch.zeros(len(pixels), model.latents)
    first = net(x, eps).item()
    images = (255 * pixels).astype(np.uint8)
    train(torch, net, images=images, batch_size=32, learning_rate=3e-3)(20)
    assert net(x, eps).item() < first
    return {name for name, p in net.named_parameters() if torch.equal(p, before[name])}


@pytest.mark.torch
def test_torch_steps_learn(torch, small_vae, pixels):
    with pytorch.torch_at_its_best() as torch:
        assert trained(torch, small_vae, pixels, pytorch.torch_training) == set()


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")  # its own, on import
def test_pythaes_trainer_learns_on_the_same_layers(torch, small_vae, pixels):
    pytest.importorskip("pythae")
    with pytorch.torch_at_its_best() as torch:
        unmoved = trained(torch, small_vae, pixels, pytorch.pythae_training)
    assert unmoved == {"log_gamma"}  # its decoder variance is fixed


# ---- The command line ----


# ml_collections loads configs so.
old_loader = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


def options(*arguments, out):
    values = flags.FlagValues()
    command.define_flags(values)
    values(["bench", f"--out={out}", *arguments])
    return command.Options(values)


@old_loader
@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("--batch=64,many", "--batch: 'many' is not an integer"),
        ("--batch=8,0", "--batch must be 1 or more, not 0"),
        ("--batch=", "--batch must be 1 or more"),
        ("--kappa=0", "--kappa must be 1 or more, not 0"),
        ("--repeats=0", "--repeats must be 1 or more, not 0"),
        ("--members=-1", "--members must be 1 or more, not -1"),
        ("--what=speed", "--what='speed' must be among step, configs, sweep, "),
        ("--configs=a.py", "--configs belongs to --what=configs"),
        ("--out=LICENSE/bench", "--out=LICENSE/bench cannot be written"),
    ],
)
def test_bad_arguments_are_refused_before_measuring(tmp_path, monkeypatch, argument, said):
    monkeypatch.chdir(ROOT)
    out = argument.removeprefix("--out=") if argument.startswith("--out") else tmp_path
    with pytest.raises(InputError, match=said):
        options(argument, out=out)


@old_loader
def test_all_is_all_and_quick_is_less(tmp_path):
    full, quick = options("--what=all", out=tmp_path), options("--quick", out=tmp_path)
    assert full.what == list(command.MEASUREMENTS)
    assert quick.what == ["step"]
    assert quick.members < full.members
    assert quick.turns(5, 1.0) < full.turns(5, 1.0) == (5, 1.0)
    assert options("--repeats=7", "--quick", out=tmp_path).turns(5, 1.0).repeats == 7


@old_loader
def test_a_page_names_the_command_that_makes_it_and_none_other(tmp_path, monkeypatch):
    given = ["--what=all", f"--out={tmp_path}", "--quick", "--batch=8,16", "--configs="]
    given.append("--config.train.batch_size=4")
    monkeypatch.setattr(sys, "argv", ["bench", *given])  # where config flags look for fields
    values = flags.FlagValues()
    command.define_flags(values)
    values(sys.argv)
    told = shlex.split(command.command("sweep", values))
    assert told[:4] == ["python", "-m", "vaebal.bench", "--what=sweep"]
    assert sorted(told[4:]) == ["--batch=8,16", "--config.train.batch_size=4", "--quick"]


@old_loader
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("configs/nothing.py", "configs holds 'configs/nothing.py'"),
        ("configs/mnist_kappa.py:qick", "mnist_kappa has no variant 'qick'"),
    ],
)
def test_a_config_that_cannot_be_loaded_is_named(monkeypatch, name, said):
    monkeypatch.chdir(ROOT)
    with pytest.raises(InputError, match=said) as error:
        subjects.load_config(name)
    assert "\n" not in str(error.value)


def test_configs_without_a_vae_are_refused():
    with pytest.raises(InputError, match="experiment='theorem1' has no training step"):
        subjects.build_model(theorem1.get_config(), None)


def test_command_line_answers_bad_input_in_one_sentence():
    done = subprocess.run(
        [sys.executable, "-m", "vaebal.bench", "--what=speed"],
        capture_output=True, text=True, cwd=ROOT, timeout=300,
        env={**os.environ, "JAX_PLATFORMS": "cpu"}, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if "xla_bridge" not in line]
    assert len(lines) == 1, done.stderr
    assert "--what='speed' must be among" in lines[0]
