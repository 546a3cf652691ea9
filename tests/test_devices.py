"""One run on one device, on eight, in two processes: the same run."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from vaebal.errors import InputError
from vaebal.experiments import ON_ONE_PROCESS, fields_of, run
from vaebal.training import devices, mesh_for
from vaebal.training.program import placed

ROOT = Path(__file__).parent.parent
SMALL_RUN = ROOT / "tests" / "small_run.py"


def environment(local_devices: int) -> dict[str, str]:
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", "")
        + f" --xla_force_host_platform_device_count={local_devices}",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
    }


ON_EIGHT = """
import re, sys
from pathlib import Path
import jax, numpy as np
from small_run import small_program
from vaebal.training.checkpoints import Checkpoints, fingerprint
from vaebal.measures.evaluation import posterior
from vaebal.models import mlp_vae
from vaebal.training import member_params, mesh_for
from vaebal.training.program import WHOLE_BELOW

jax.config.update("jax_disable_most_optimizations", True)
out = Path(sys.argv[1])
keep = lambda name, tree: np.savez(out / name, *jax.tree.leaves(jax.device_get(tree)))
eight, two, one = (mesh_for(2, jax.devices()[:count]) for count in (8, 2, 1))
assert dict(eight.shape) == {"member": 2, "data": 4}

for mesh, name in ((one, "f32_one"), (eight, "f32_eight")):
    program = small_program(mesh=mesh)
    keep(name, program.run(program.init(), 7))
program = small_program(kappas=(None, 3), mesh=one)
keep("f32_alone", program.run(program.init(), 7))

jax.config.update("jax_enable_x64", True)
programs = {n: small_program(True, mesh=mesh) for n, mesh in (("one", one), ("eight", eight))}
ends = {n: program.run(program.init(), 67) for n, program in programs.items()}
for name, end in ends.items():
    keep(f"f64_{name}", end)
keep("f64_few", programs["one"].run(programs["one"].init(), 20))
spread = ends["eight"][0]  # a member on each half of the devices
assert {leaf.addressable_data(0).shape[0] for leaf in jax.tree.leaves(spread)} == {1}
program = small_program(True, kappas=(None, 3), mesh=one)
keep("f64_alone", program.run(program.init(), 67))

with Checkpoints(out / "ck") as checkpoints:
    checkpoints.save(67, ends["eight"][0])
program = small_program(True, mesh=two)
with Checkpoints(out / "ck") as checkpoints:
    _, state = checkpoints.restore_latest(program.state_shapes)
assert {leaf.sharding.num_devices for leaf in jax.tree.leaves(state)} == {2}
keep("restored", state)

model = mlp_vae(outputs=16, latents=5, width=12, encoder_layers=3, decoder_blocks=1,
                activation=jax.nn.silu, residual=True, affine_skip=True)
images = np.random.default_rng(1).uniform(size=(101, 16))  # divides by no number of devices
for name, end in (("one", ends["one"][0]), ("two", state), ("eight", ends["eight"][0])):
    keep(f"posterior_{name}", posterior(model, member_params(end, 0), images, seed=0, block=16))

keep("later_on_two", program.run(state, 3)[0])
keep("later_on_eight", programs["eight"].run(ends["eight"][0], 3)[0])

for name, shard in (("whole", False), ("split", True)):
    program = small_program(True, kappas=(5,), width=128, mesh=mesh_for(1), shard_parameters=shard)
    state, metrics = program.run(program.init(), 67)
    keep(f"f64_{name}", (state, metrics))
    held = [leaf.addressable_data(0).nbytes for leaf in jax.tree.leaves(state)]
    marks = fingerprint(state), fingerprint(jax.device_get(state))
    np.savez(out / f"held_{name}", sum(held), len(held), *marks)
    joined = re.findall(r"= (.*) all-gather(?:-start)?\\(", program._run.as_text())
    shapes = [eval(f"[{shape}]") for shape in re.findall(r"f64\\[([\\d,]+)\\]", " ".join(joined))]
    large = sum(np.prod(shape) >= WHOLE_BELOW for shape in shapes)
    weights = sum(leaf[0].size >= WHOLE_BELOW for leaf in jax.tree.leaves(state.params))
    np.savez(out / f"joined_{name}", large, weights, program.memory())
"""


ON_CORES = """
import contextlib, sys, time
from pathlib import Path
import jax, numpy as np
from small_run import small_program
from vaebal.training import devices, mesh_for
from vaebal.training.checkpoints import Checkpoints

jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_enable_x64", True)
assert devices.are_cores()
shapes = [dict(mesh_for(members).shape) for members in (1, 2, 3, 4, 5, 7)]
assert all(shape["data"] == 1 for shape in shapes)
assert [shape["member"] for shape in shapes] == [1, 2, 3, 2, 3, 3]
out, kappas = Path(sys.argv[1]), (5, 4, 3, 2)
keep = lambda name, tree: np.savez(out / name, *jax.tree.leaves(jax.device_get(tree)))
one = small_program(True, kappas=kappas, mesh=mesh_for(4, jax.devices()[:1]))
keep("one", one.run(one.init(), 20))
uneven = jax.make_mesh((3, 1), ("member", "data"), axis_types=2 * (jax.sharding.AxisType.Auto,))
state = {}
for name, mesh in (("two", mesh_for(4)), ("filled", uneven)):  # 2 and 2; 2, 1 and one filled up
    program = small_program(True, kappas=kappas, mesh=mesh)
    with Checkpoints(out / name) as checkpoints:
        checkpoints.save(10, program.run(program.init(), 10)[0])
    state[name] = program
for name, other in (("two", "filled"), ("filled", "two")):
    with Checkpoints(out / other) as checkpoints:
        _, half = checkpoints.restore_latest(state[name].state_shapes)
    keep(name, state[name].run(half, 10))

on = {}  # by item: where what it makes lies
def work(item):
    on[item] = jax.jit(lambda x: x + 1)(np.zeros(())).devices()
    if item == 4:
        raise KeyError(item)
    time.sleep(0.2)  # else one core has done all before the next has begun

assert list(devices.on_every_core(work, range(3))) == [0, 1, 2]
assert set.union(*on.values()) == set(jax.devices())
done = []
with contextlib.suppress(KeyError):
    for item in devices.on_every_core(work, range(100)):
        done.append(item)
assert set(done) <= {0, 1, 2, 3} and set(on) == set(range(max(on) + 1)) and max(on) <= 6
"""


def test_work_where_devices_are_no_cores_is_done_one_after_the_other():
    begun = []
    assert not devices.are_cores()
    items = devices.on_every_core(begun.append, "abc")
    assert (next(items), begun) == ("a", ["a"])
    assert (list(items), begun) == (["b", "c"], ["a", "b", "c"])


def load(file: Path) -> list[np.ndarray]:
    with np.load(file) as arrays:
        return list(arrays.values())


def assert_close(got: list, expected: list, rtol: float) -> None:
    """Relative to each array's largest entry: single entries pass through zero."""
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        a, b = (leaf.astype(int) if leaf.dtype == bool else leaf for leaf in (a, b))
        both = ~(np.isnan(a) & np.isnan(b))
        assert np.abs(a - b)[both].max(initial=0) <= rtol * np.abs(b)[both].max(initial=0)


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    """The ends of runs on one, two and eight virtual devices of one process."""
    out = tmp_path_factory.mktemp("devices")
    subprocess.run(
        [sys.executable, "-c", ON_EIGHT, str(out)], env=environment(8), check=True, timeout=600
    )
    return out


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "steps", "rtol"), [("f64", 201, 1e-12), ("f32", 21, 1e-5)])
def test_eight_devices_equal_one(ends, precision, steps, rtol):
    """States and metrics; the steps have been taken, and have changed something."""
    one = load(ends / f"{precision}_one.npz")
    assert one[0].tolist() == [steps, steps]
    assert_close(load(ends / f"{precision}_eight.npz"), one, rtol)


@pytest.mark.slow
def test_a_stack_on_the_cores_of_a_cpu_is_that_on_one_also_where_it_comes_out_uneven(tmp_path):
    """Four members on two and on three of three cores, one going on where the other was saved."""
    cores = environment(1) | {"XLA_FLAGS": os.environ.get("XLA_FLAGS", "")}
    subprocess.run(
        [sys.executable, "-c", ON_CORES, str(tmp_path)],
        env=cores | {"JAX_NUM_CPU_DEVICES": "3"}, check=True, timeout=600,
    )  # fmt: skip
    one = load(tmp_path / "one.npz")
    assert one[0].tolist() == [60, 60, 60, 60]
    for name in ("two", "filled"):
        assert_close(load(tmp_path / f"{name}.npz"), one, 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "rtol"), [("f64", 1e-12), ("f32", 1e-5)])
def test_a_padded_member_on_eight_devices_is_the_member_alone_on_one(ends, precision, rtol):
    """The second, with kappa = 3 of 5, over 201 steps and 21; its state is padded beyond kappa."""
    alone = load(ends / f"{precision}_alone.npz")
    stacked = load(ends / f"{precision}_eight.npz")
    got = [a[1:][tuple(map(slice, b.shape))] for a, b in zip(stacked, alone, strict=True)]
    assert sum(a.size < b[1:].size for a, b in zip(got, stacked, strict=True)) >= 12
    assert_close(got, alone, rtol)


@pytest.mark.slow
def test_what_eight_devices_saved_goes_on_on_two(ends):
    """The values come back exactly, on two devices, and training goes on as on eight."""
    restored = load(ends / "restored.npz")
    assert_close(restored, load(ends / "f64_eight.npz")[: len(restored)], 0)
    assert_close(load(ends / "later_on_two.npz"), load(ends / "later_on_eight.npz"), 1e-12)


@pytest.mark.slow
def test_split_parameters_are_the_whole_ones_over_200_steps_in_float64(ends):
    """On eight devices that share each batch, with less than a quarter of the memory for them."""
    whole = load(ends / "f64_whole.npz")
    assert whole[0].tolist() == [201]
    assert_close(load(ends / "f64_split.npz"), whole, 1e-12)
    (held_whole, leaves, *_), (held_split, _, *marks) = (
        load(ends / f"held_{name}.npz") for name in ("whole", "split")
    )
    np.testing.assert_array_equal(*marks)  # a checkpoint's fingerprint, of all parts and of one
    assert held_whole == sum(leaf.nbytes for leaf in whole[:leaves])
    assert held_split < held_whole / 4


@pytest.mark.slow
def test_of_split_states_a_step_joins_the_weights_alone(ends):
    """Each large weight once, for its products; moments stay apart, and so does the memory."""
    (_, _, whole), (joined, weights, split) = (
        load(ends / f"joined_{name}.npz") for name in ("whole", "split")
    )
    assert 0 < joined <= weights
    assert split < whole / 2


@pytest.mark.parametrize(
    ("shape", "split", "axes"),
    [
        ((2, 256, 512), True, ("member", None, "data")),
        ((2, 512, 256), True, ("member", "data", None)),
        ((2, 513, 256), True, ("member", None, "data")),  # 513 / 4 is no integer
        ((2, 513, 255), True, ("member", None, None)),
        ((2, 64, 64), True, ("member", None, None)),  # small
        ((2, 256, 512), False, ("member", None, None)),
        ((2,), True, ("member",)),
    ],
)
def test_leaves_are_split_along_the_longest_axis_that_divides(shape, split, axes):
    mesh = AbstractMesh((2, 4), ("member", "data"))
    got = placed({"a": np.zeros(shape, np.float32)}, mesh, split)["a"]
    assert (got.shape, got.dtype, got.sharding.spec) == (shape, np.float32, PartitionSpec(*axes))


@pytest.mark.slow
@pytest.mark.parametrize("count", ["two", "eight"])
def test_every_example_is_evaluated_once_on_any_number_of_devices(ends, count):
    """101 of them, in blocks of 16."""
    one = load(ends / "posterior_one.npz")
    assert [len(each) for each in one[:3]] == [101] * 3
    assert_close(load(ends / f"posterior_{count}.npz"), one, 1e-11)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def two_processes(workdir: Path, **options) -> list[subprocess.Popen]:
    port = free_port()
    return [
        subprocess.Popen(
            [
                *(sys.executable, SMALL_RUN, f"--workdir={workdir}", "--epochs=20", "--float64"),
                *(f"--address=127.0.0.1:{port}", "--processes=2", f"--process={process}"),
                *(f"--{name}={value}" for name, value in options.items()),
            ],
            env=environment(4), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for process in (0, 1)
    ]  # fmt: skip


@pytest.mark.slow
def test_two_processes_leave_together_on_notice_and_end_as_one_device(ends, tmp_path):
    """SIGTERM comes to the second alone, in mid-run; started again they finish the 60 steps."""
    processes = two_processes(tmp_path / "run", pause=0.3)
    try:
        for line in processes[1].stdout:
            if line.strip() == "6":
                break
        processes[1].send_signal(signal.SIGTERM)
        said = [process.communicate(timeout=300)[0] for process in processes]
        assert [process.returncode for process in processes] == [75, 75], said
        assert all("Stopped on notice after epoch" in text for text in said)

        processes = two_processes(tmp_path / "run", save=tmp_path / "end.npz")
        said = [process.communicate(timeout=300)[0] for process in processes]
        assert [process.returncode for process in processes] == [0, 0], said
        assert "\n2\n" not in said[0]  # not from the start
    finally:
        for process in processes:
            process.kill()
    end = load(tmp_path / "end.npz")
    assert_close(end, load(ends / "f64_few.npz")[: len(end)], 1e-12)
    assert json.loads((tmp_path / "run" / "config.json").read_text()) == {"epochs": 20}


def pipeline(workdir: Path, *arguments, local_devices: int) -> subprocess.Popen:
    """The generation experiment on the digits, three epochs a stage, as a process."""
    fields = {
        "train.seeds": (0,), "train.batch_size": 256, "train.epochs_per_checkpoint": 2,
        "flow.epochs": 0, "ae.codes": 4, "vae.spaces": ("pixels",), "classifier.features": 6,
        "eval.bins": (5,), "eval.samples": 250, "eval.block": 200, "eval.parts": 2,
        "eval.pictures": 3,
    }  # fmt: skip
    for section in ("ae", "vae", "vae_plus", "wae", "classifier"):
        fields |= {f"{section}.width": 16, f"{section}.epochs": 3}
    return subprocess.Popen(
        [
            *(sys.executable, ROOT / "main.py", f"--config={ROOT}/configs/digits_generation.py"),
            *(f"--config.{name}={value}" for name, value in fields.items()),
            *(f"--workdir={workdir}", *arguments),
        ],
        env=environment(local_devices),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


@pytest.mark.slow
def test_a_pipeline_begun_in_one_process_ends_in_two_as_in_one(tmp_path):
    """Its first stage finished, and nothing else; the first process alone writes and prints."""
    whole = pipeline(tmp_path / "one", local_devices=2)
    said = whole.communicate(timeout=600)[0]
    assert whole.returncode == 0, said
    for folder in (tmp_path / "one").glob("*/ae_seed0"):
        shutil.copytree(folder, tmp_path / "two" / folder.parent.name / folder.name)
    for name in ("config.json", "data.json"):
        shutil.copy(tmp_path / "one" / name, tmp_path / "two")
    address = f"--coordinator_address=127.0.0.1:{free_port()}"
    processes = [
        pipeline(
            tmp_path / "two", "--distributed", address, "--num_processes=2",
            f"--process_id={process}", local_devices=1,
        )
        for process in (0, 1)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=600)[0] for process in processes]
        assert [process.returncode for process in processes] == [0, 0], said
    finally:
        for process in processes:
            process.kill()
    assert "ae_seed0: finished before, not done again" in said[0]
    assert "VAE+" in said[0]
    assert "VAE+" not in said[1]
    for name in ("rows.json", "stages.json"):
        one, two = (json.loads((tmp_path / each / name).read_text()) for each in ("one", "two"))
        assert len(one) == len(two) > 0
        for expected, got in zip(one, two, strict=True):
            assert set(got) == set(expected)
            for field in set(got) - {"train_seconds", "device"}:
                value = expected[field]
                if isinstance(value, float):
                    value = pytest.approx(value, rel=1e-3, abs=1e-4)
                assert got[field] == value, field


@pytest.mark.parametrize("experiment", ON_ONE_PROCESS)
def test_what_runs_in_one_process_refuses_several(experiment, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    config = fields_of(experiment).defaults("a")
    with pytest.raises(InputError, match=f"'{experiment}' runs in one process: leave out --distr"):
        run(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("given", [("a:1", None, None), ("a:1", 2, None), (None, None, 0)])
def test_part_of_an_address_is_refused(given):
    with pytest.raises(InputError, match=r"belong together: give all three, or none"):
        devices.join(*given)


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--process_id=1", "--coordinator_address, --num_processes, --process_id mean nothing"),
        ("--distributed", "--distributed does not find the other processes"),
    ],
)
def test_main_refuses_processes_that_it_cannot_find(tmp_path, flag, said):
    done = subprocess.run(
        [sys.executable, ROOT / "main.py", flag, f"--workdir={tmp_path / 'run'}"],
        env=environment(1), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"error: {said}")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_notice_is_only_what_comes_while_it_is_asked_for():
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with devices.LeaveNotice() as notice:
            assert not notice.given([1])
            os.kill(os.getpid(), signal.SIGTERM)
            assert notice.given([2])
        os.kill(os.getpid(), signal.SIGTERM)
        with devices.LeaveNotice() as notice:
            assert not notice.given([1])
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    ("members", "count", "shape"),
    [
        (1, 8, (1, 8)),
        (2, 8, (2, 4)),
        (12, 8, (4, 2)),
        (16, 8, (8, 1)),
        (25, 8, (1, 8)),
        (5, 1, (1, 1)),
    ],
)
def test_members_are_spread_as_far_as_they_divide(monkeypatch, members, count, shape):
    monkeypatch.setattr(
        jax, "make_mesh", lambda shape, axes, **_: dict(zip(axes, shape, strict=True))
    )
    assert mesh_for(members, range(count)) == dict(zip(("member", "data"), shape, strict=True))


def test_local_copies_are_on_one_device():
    sharding = NamedSharding(mesh_for(1), PartitionSpec())
    tree = devices.place({"a": np.arange(3.0), "b": np.int32(2)}, sharding)
    got = devices.local(tree)
    assert {leaf.sharding.num_devices for leaf in jax.tree.leaves(got)} == {1}
    np.testing.assert_array_equal(got["a"], [0, 1, 2])
