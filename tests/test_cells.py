"""The runner of cells: what is kept of a run that was killed, of one that stopped, of the rest."""

import json
import sys
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vaebal.errors import Diverged, InputError
from vaebal.experiments import cells as runner
from vaebal.experiments.cells import Cells, Schedule
from vaebal.training import Member, Objective, Optimisation, Program, Told, fit, stack_members
from vaebal.training.optimiser import averaged
from vaebal.training.progress import Progress

fit_module = sys.modules[fit.__module__]
SETTINGS = Optimisation(0.1, 0.1, 0, 10**6, 1e9)
EPOCHS, STEPS, BATCH = 6, 2, 4
SCHEDULE = Schedule(EPOCHS, 1, 2, STEPS, BATCH)
ROWS = np.random.default_rng(0).normal(size=(9, 3)).astype(np.float32)
COMPILING, AN_EPOCH = 100.0, 10.0


class Cell(NamedTuple):
    """A member whose loss is not finite from step `end` on; none, if that is negative."""

    end: int
    seed: int

    @property
    def name(self):
        return f"end{self.end}_seed{self.seed}"


GROUP = Cell(-1, 0), Cell(-1, 1)


def loss(params, batch, at):
    stops = at.step == at.member.rule["end"]
    value = jnp.square(batch - params["w"][None, :]).sum(1).mean()
    return jnp.where(stops, jnp.nan, value), Told({"length": jnp.linalg.norm(params["w"])})


def build(group):
    objective = Objective(lambda member, given: {"w": jnp.zeros(3)}, loss, dim=3)
    members = [Member(cell.seed, rule={"end": cell.end}) for cell in group]
    return Program(objective, SETTINGS, stack_members(members), ROWS, BATCH)


@pytest.fixture(scope="module")
def program():
    return build(GROUP)


@pytest.fixture
def clock(monkeypatch):
    """One that only work moves, and, by next to nothing, being looked at."""
    now = [0.0]

    def perf_counter():
        now[0] += 1e-6
        return now[0]

    fake = SimpleNamespace(perf_counter=perf_counter)
    monkeypatch.setattr(runner, "time", fake)
    monkeypatch.setattr(fit_module, "time", fake)
    return now


class Clocked:
    """A program whose epochs take their time, and which may be killed in one."""

    def __init__(self, program, clock, killed_in=None):
        self._program, self._clock, self._killed_in = program, clock, killed_in
        self._done = 0

    def __getattr__(self, name):
        return getattr(self._program, name)

    def run(self, state, epochs):
        self._done += epochs
        if self._done == self._killed_in:
            raise KeyboardInterrupt
        self._clock[0] += epochs * AN_EPOCH
        return self._program.run(state, epochs)


def evaluate(cell, params, state):
    return {"w": params["w"].tolist()}, {"w": params["w"]}


def train(cells, program, group=GROUP, evaluate=evaluate, **options):
    with Progress(1, cells.path / "tensorboard") as progress:
        runner.train(
            cells, "a-group", group, lambda: program, SCHEDULE, evaluate, progress, **options
        )


def test_a_row_holds_the_cell_its_numbers_and_its_training(tmp_path, program):
    cells = Cells(tmp_path)
    assert not cells.finished(*GROUP)
    train(cells, program)
    assert cells.finished(*GROUP)
    state, _ = program.run(program.init(), EPOCHS)
    for index, cell in enumerate(GROUP):
        row = cells.row(cell)
        assert list(row)[:2] == ["end", "seed"]
        assert (row["end"], row["seed"]) == cell
        assert (row["epochs"], row["steps"], row["batch_size"]) == (EPOCHS, EPOCHS * STEPS, BATCH)
        np.testing.assert_array_equal(row["w"], state.weights["w"][index])
        np.testing.assert_array_equal(cells.arrays(cell)["w"], state.weights["w"][index])
        params = cells.params(cell, "a-group", index, program.state_shapes)
        np.testing.assert_array_equal(params["w"], state.weights["w"][index])
    assert np.abs(np.diff(state.weights["w"], axis=0)).max() > 1e-3  # the two do differ


def test_a_resumed_runs_seconds_count_all_starts(tmp_path, program, clock):
    """Killed in the sixth epoch: the fifth, which no checkpoint holds, was done twice."""

    def made(killed_in=None):
        clock[0] += COMPILING
        return Clocked(program, clock, killed_in)

    for name, kills in (("whole", ()), ("killed", (6,)), ("twice", (4, 4))):
        cells = Cells(tmp_path / name)
        for killed_in in (*kills, None):
            with Progress(1, cells.path / "tensorboard") as progress:
                start = lambda killed_in=killed_in: made(killed_in)  # noqa: E731
                try:
                    runner.train(cells, "a", GROUP, start, SCHEDULE, evaluate, progress)
                except KeyboardInterrupt:
                    assert killed_in is not None
                    assert not cells.finished(*GROUP)
        for cell in GROUP:
            entries = cells.history(cell)
            assert [entry["epoch"] for entry in entries] == list(range(1, EPOCHS + 1))
            assert [entry["step"] for entry in entries] == list(range(2, 13, STEPS))
            assert entries[-1]["seconds"] == pytest.approx(EPOCHS * AN_EPOCH, rel=1e-4)
            expected = (COMPILING + EPOCHS * AN_EPOCH) / len(GROUP)
            assert cells.row(cell)["train_seconds"] == pytest.approx(expected, rel=1e-4)


def test_a_resumed_runs_history_is_the_whole_runs(tmp_path, program, clock):
    """In one file of whole lines, up to the last checkpoint at any time."""
    whole, killed = Cells(tmp_path / "whole"), Cells(tmp_path / "killed")
    train(whole, Clocked(program, clock))
    with pytest.raises(KeyboardInterrupt):
        train(killed, Clocked(program, clock, killed_in=6))
    assert [entry["epoch"] for entry in killed.history(GROUP[0])] == [1, 2, 3, 4]
    train(killed, Clocked(program, clock))
    timeless = lambda cells, cell: [e | {"seconds": 0} for e in cells.history(cell)]  # noqa: E731
    for cell in GROUP:
        expected = timeless(whole, cell)
        assert timeless(killed, cell) == expected
        assert set(expected[0]) == {
            *("epoch", "step", "seconds", "loss", "length", "gradient_norm", "stopped"),
        }
        _, metrics = program.run(program.init(), 3)
        index = GROUP.index(cell)
        assert expected[2]["loss"] == pytest.approx(float(metrics["loss"][index]), rel=1e-6)
        text = (killed.folder(cell) / "history.jsonl").read_text()
        assert text.endswith("}\n")
        assert text.count("\n") == EPOCHS


def test_a_cell_that_stops_has_its_step_for_a_row_and_its_history_to_there(tmp_path):
    """And the others of its group are what they are without it."""
    group = Cell(-1, 0), Cell(5, 1), Cell(0, 2)
    cells = Cells(tmp_path)
    train(cells, build(group), group)
    assert cells.finished(*group)
    assert cells.row(group[1]) == {"end": 5, "seed": 1, "stopped": 5}
    assert cells.row(group[2]) == {"end": 0, "seed": 2, "stopped": 0}
    with pytest.raises(InputError, match="stopped at step 5, its loss, gradient or gamma not fin"):
        cells.params(group[1], "group", 1, None)
    assert [entry["epoch"] for entry in cells.history(group[0])] == list(range(1, EPOCHS + 1))
    assert [entry["epoch"] for entry in cells.history(group[1])] == [1, 2]  # of two steps each
    assert cells.history(group[2]) == []
    assert not (cells.folder(group[1]) / "arrays.npz").exists()
    alone = build(group[:1])
    state, _ = alone.run(alone.init(), EPOCHS)
    np.testing.assert_allclose(cells.row(group[0])["w"], state.weights["w"][0], rtol=1e-6)

    written = []
    rows = {cell: cells.row(cell) for cell in group}
    with pytest.raises(Diverged, match=r"end5_seed1 \(step 5\).*end0_seed2 \(step 0\).*Mend it"):
        runner.report_all(rows, "Mend it", lambda *told: written.append(told))
    ((finished, said),) = written
    assert list(finished) == [group[0]]
    assert "end5_seed1" in said


def test_where_none_may_stop_the_first_ends_the_group(tmp_path):
    group = Cell(-1, 0), Cell(5, 1)
    cells = Cells(tmp_path)
    with pytest.raises(Diverged, match=r"not finite at step 5 .*last good checkpoint: .*a-group/2"):
        train(cells, build(group), group, diverged_goes_on=False)
    assert not cells.finished(group[0])
    assert [entry["epoch"] for entry in cells.history(group[0])] == [1, 2]


def test_a_cell_whose_evaluation_failed_is_evaluated_again_and_not_trained(tmp_path, program):
    """The row is written last, after the arrays; the cell before it in the group is kept."""
    cells, evaluated = Cells(tmp_path), []

    def fails(cell, params, state):
        if cell == GROUP[1]:
            raise OSError("a disk is full")
        return evaluate(cell, params, state)

    with pytest.raises(OSError, match="a disk is full"):
        train(cells, program, evaluate=fails)
    assert [cells.finished(cell) for cell in GROUP] == [True, False]

    class Untrained(Clocked):
        def run(self, state, epochs):
            pytest.fail("trained again")

    def counted(cell, params, state):
        evaluated.append(cell)
        return evaluate(cell, params, state)

    train(cells, Untrained(program, [0.0]), evaluate=counted)
    assert GROUP[1] in evaluated
    state, _ = program.run(program.init(), EPOCHS)
    np.testing.assert_array_equal(cells.row(GROUP[1])["w"], state.weights["w"][1])


def test_finished_groups_are_not_trained_again_and_rows_keep_their_order(tmp_path, capsys):
    cells = Cells(tmp_path, "members")
    groups = {"b": [Cell(1, 0)], "a": [Cell(2, 0), Cell(2, 1)]}
    trained = []

    def train_group(name, group, progress):
        trained.append(name)
        for cell in group:
            cells.write_row(cell, cell._asdict() | {"number": cell.seed})

    expected = {
        cell: cell._asdict() | {"number": cell.seed} for cell in (*groups["b"], *groups["a"])
    }
    for _ in range(2):
        assert runner.train_all(cells, groups, train_group) == expected
    assert list(expected) == list(runner.train_all(cells, groups, train_group))
    assert trained == ["b", "a"]
    assert capsys.readouterr().out.count("finished before") == 4
    # One lost row takes its whole group with it, and no other.
    (cells.folder(Cell(2, 1)) / "row.json").unlink()
    runner.train_all(cells, groups, train_group)
    assert trained == ["b", "a", "a"]


def test_the_parameters_of_an_unfinished_cell_are_refused(tmp_path, program):
    with pytest.raises(InputError, match=r"'end-1_seed0' is not finished in .*: make it first"):
        Cells(tmp_path).params(GROUP[0], "a", 0, program.state_shapes)


def test_small_members_are_stacked_on_a_cpu_and_all_elsewhere(monkeypatch):
    assert runner.worth_stacking(299_999)
    assert not runner.worth_stacking(300_000)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert runner.worth_stacking(300_000)


def test_rows_are_json(tmp_path):
    cells = Cells(tmp_path)
    cells.write_row(GROUP[0], {"number": 1.5})
    text = (tmp_path / "runs" / "end-1_seed0" / "row.json").read_text()
    assert json.loads(text) == cells.row(GROUP[0]) == {"number": 1.5}


def test_what_is_evaluated_is_the_mean_of_the_weights_where_one_is_kept(tmp_path):
    objective = Objective(lambda member, given: {"w": jnp.zeros(3)}, loss, dim=3)
    members = stack_members([Member(cell.seed, rule={"end": cell.end}) for cell in GROUP])
    kept = Program(objective, SETTINGS._replace(average=0.9), members, ROWS, BATCH)
    cells = Cells(tmp_path)
    train(cells, kept)
    state, _ = kept.run(kept.init(), EPOCHS)
    mean = np.asarray(averaged(state.opt_state, state.weights)["w"])
    assert np.abs(mean - state.weights["w"]).max() > 1e-3
    for index, cell in enumerate(GROUP):
        np.testing.assert_array_equal(cells.row(cell)["w"], mean[index])
        params = cells.params(cell, "a-group", index, kept.state_shapes)
        np.testing.assert_array_equal(params["w"], mean[index])
