"""Stacked members as one compiled program: whole epochs in one call, on any number of devices.

Members whose states have equal shapes are stacked on a leading axis M and vmapped; a lone member is
the case M = 1. Nothing that training does depends on how it is cut into chunks, so a resumed run
repeats the uninterrupted one. `Program` keeps its rows on the device, `Streamed` has them fed from
the host or from disk.
"""

import copy
import functools
import math
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vaebal.data import epoch_order, steps_per_epoch
from vaebal.data.feeding import Feeder
from vaebal.training.devices import are_cores, place
from vaebal.training.optimiser import Optimisation
from vaebal.training.step import At, Member, Objective, Rule, State, init_state, train_step

# Leaves with fewer elements are never split: their gathering would cost more than their memory.
WHOLE_BELOW = 2**14
# Bytes of a streamed chunk. The device holds two of them, the host at most as many again as it
# gathers.
CHUNK_BYTES = 2**26

# What `run` tells of an epoch, by name, each [M]; but for "stopped" NaN of a member that has.
Metrics = dict[str, Array]
# A state, and the sums of its steps' statistics.
Tallied = tuple[State, dict[str, Array]]


def mesh_for(members: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Axes "member" and "data" over `devices`: all of every process unless told otherwise.

    Members need no word from each other, so they come first: a stack is spread over the greatest
    common divisor of its size and the devices' number, and the devices that this leaves to every
    part of it share each batch. Where the devices are the cores of one CPU, batches are shared by
    none, as operations are by all cores anyhow; a stack is spread over as many as give the largest
    part of it the least, and where that does not come out even the last parts are filled up.
    """
    if devices is None and are_cores():
        rounds = -(-members // jax.device_count())
        devices = jax.devices()[: -(-members // rounds)]
        spread = len(devices)
    else:
        devices = jax.devices() if devices is None else devices
        spread = math.gcd(members, len(devices))
    return jax.make_mesh(
        (spread, len(devices) // spread), ("member", "data"),
        axis_types=(AxisType.Auto, AxisType.Auto), devices=devices,
    )  # fmt: skip


def _filled(tree: Any, parts: int) -> Any:
    """[M, ...] with its last entry again, until `parts` divides M."""

    def one(leaf):
        missing = -len(leaf) % parts
        joined = np.concatenate if isinstance(leaf, np.ndarray) else jnp.concatenate
        return joined([leaf, *missing * [leaf[-1:]]]) if missing else leaf

    return jax.tree.map(one, tree)


def placed(shapes: Any, mesh: Mesh, split: bool) -> Any:
    """Stacked states' shapes [M, ...], with where they lie on a mesh of `mesh_for`.

    Each device holds its own members, or all where the devices do not divide them. If `split`, it
    holds only a part of their larger leaves, cut along the longest axis that the data axis divides
    (fully sharded data parallelism).

    Args:
      shapes: a tree of arrays or jax.ShapeDtypeStruct.

    Returns:
      The tree of jax.ShapeDtypeStruct with shardings.
    """
    parts = mesh.shape["data"]

    def one(leaf) -> jax.ShapeDtypeStruct:
        spread = "member" if leaf.shape[0] % mesh.shape["member"] == 0 else None
        axes: list[str | None] = [spread, *(None for _ in leaf.shape[1:])]
        cuts = [axis for axis in range(1, leaf.ndim) if leaf.shape[axis] % parts == 0]
        if split and cuts and math.prod(leaf.shape[1:]) >= WHOLE_BELOW:
            axes[max(cuts, key=lambda axis: leaf.shape[axis])] = "data"
        sharding = NamedSharding(mesh, PartitionSpec(*axes))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(one, shapes)


def _init(
    objective: Objective, settings: Optimisation, rule: Rule, members: Member, given: Any
) -> State:
    """Stacked members' states before their first step."""
    start = lambda member, own: init_state(objective, settings, rule, member, own)  # noqa: E731
    return jax.vmap(start)(members, given)


def state_shapes(
    objective: Objective,
    settings: Optimisation,
    rule: Rule,
    members: Member,
    given: Any,
    *,
    mesh: Mesh | None = None,
    split: bool = False,
) -> State:
    """Of a program's stacked states, with shardings, to restore a checkpoint without compiling.

    Args:
      given: the objective's, [M, ...], or the shapes of it.
      mesh, split: see `Program`.
    """
    mesh = mesh_for(len(members.seed)) if mesh is None else mesh
    start = lambda members, given: _init(objective, settings, rule, members, given)  # noqa: E731
    return placed(jax.eval_shape(start, members, given), mesh, split=split)


def _compiled(function: Any, *arguments: Any, **options: Any) -> Any:
    """Compiled ahead of time, so that it cannot retrace: other shapes are an error."""
    return jax.jit(function, **options).lower(*arguments).compile()


class _Compiled:
    """What both kinds of program share: how a member begins, steps, and is told of.

    In several processes every call is made by all of them, with the same members and rows.

    Attributes:
      state_shapes: of the stacked states, with shardings.
      compile_seconds: what compiling took.
    """

    def __init__(
        self, objective: Objective, settings: Optimisation, rule: Rule, mesh: Mesh, split: bool
    ):
        self._objective, self._settings, self._rule = objective, settings, rule
        self._mesh, self._split = mesh, split
        self._whole = NamedSharding(mesh, PartitionSpec())
        self._by_member = NamedSharding(mesh, PartitionSpec("member"))
        self._by_example = NamedSharding(mesh, PartitionSpec("data"))

    def _compile_init(self) -> None:
        whole = (self._objective, self._settings, self._rule)
        own = lambda tree: jax.tree.map(lambda leaf: leaf[: self._size], tree)  # noqa: E731
        start = lambda members, given: own(_init(*whole, members, given))  # noqa: E731
        init = jax.jit(start, inline=True)  # traced once for its shapes and to be compiled
        shapes = jax.eval_shape(init, self._members, self._given)
        self.state_shapes = placed(shapes, self._mesh, self._split)
        self._shardings = jax.tree.map(lambda leaf: leaf.sharding, self.state_shapes)
        self._init = _compiled(init, self._members, self._given, out_shardings=self._shardings)

    def _stepped(
        self, member: Member, state: State, batch: Any, given: Any
    ) -> tuple[State, dict[str, Array]]:
        """A step, and its statistics."""
        batch = jax.lax.with_sharding_constraint(batch, self._by_example)
        return train_step(self._objective, self._settings, self._rule, member, state, batch, given)

    def _told(
        self, member: Member, tallied: Tallied, steps: int, probe: Any, given: Any
    ) -> Metrics:
        """The metrics of an epoch of `steps` steps; `probe` is a batch to look at."""
        state, sums = tallied
        number = member.latents if self._rule is None else state.homotopy.open
        means = jax.tree.map(lambda total: total / steps, sums)
        at = At(member, state.step, jnp.asarray(number), given)
        metrics = dict(self._objective.summary(state.params, means, probe, at))
        if self._rule is not None:
            metrics |= {"gamma": jnp.exp(state.homotopy.log_gamma), "open": state.homotopy.open}
        running = {
            name: jnp.where(state.stopped < 0, value, jnp.nan) for name, value in metrics.items()
        }
        return running | {"stopped": state.stopped}

    def _count(self, number: int) -> Array:
        # Not device_put: between processes it compares, and so waits for the chunk before.
        return jax.make_array_from_process_local_data(self._whole, np.int32(number), ())

    def init(self) -> State:
        """Every member's state at step 0, stacked [M, ...]."""
        return self._init(self._members, self._given)


def _zeros(shapes: Any) -> Any:
    """Sums of the statistics of these shapes, over no step."""
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)


def _joined(rows: Any, own: Any) -> Any:
    """A member's rows: those of all, its own, or both.

    Raises:
      ValueError: there are both, but not as two dicts.
    """
    if isinstance(rows, dict) and isinstance(own, dict):
        return {**rows, **own}
    if jax.tree.leaves(rows) and jax.tree.leaves(own):
        raise ValueError("A member's own rows join shared ones where both are dicts.")
    return rows if jax.tree.leaves(rows) else own


def _examples(rows: Any, own: Any) -> int:
    """N."""
    shared = jax.tree.leaves(rows)
    return len(shared[0]) if shared else jax.tree.leaves(own)[0].shape[1]


def shared_given(given: Any, members: int) -> Any:
    """What is the same for all members [...], as a program takes it: [M, ...]."""
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (members, *np.shape(leaf))), given)


class Program(_Compiled):
    """A stack of members whose rows are on the device."""

    def __init__(
        self,
        objective: Objective,
        settings: Optimisation,
        members: Member,
        rows: Any,
        batch_size: int,
        *,
        given: Any = (),
        own: Any = (),
        rule: Rule = None,
        parts: int = 1,
        mesh: Mesh | None = None,
        shard_parameters: bool = False,
    ):
        """Compiles for the devices of `mesh` (default: `mesh_for` of all devices).

        Args:
          members: stacked [M].
          rows: the training split, a tree of arrays [N, ...] that all members share; or their
            shapes (jax.ShapeDtypeStruct), where it is `on` that brings the arrays.
          given: the objective's, [M, ...].
          own: rows of each member's own, [M, N, ...]: all there are, where `rows` is (), or a dict
            that joins the dict `rows`.
          rule: how gamma moves; None where the objective has none.
          parts: what `run` calls an epoch is one of so many equal parts of a pass over the rows,
            where a whole one takes longer than one would wait.
          shard_parameters: whether the devices that share a batch also share the parameters and
            the optimiser's moments, see `placed`, instead of holding copies.

        Raises:
          ValueError: fewer rows than a batch, or shared and own rows that do not join.
        """
        mesh = mesh_for(len(members.seed)) if mesh is None else mesh
        super().__init__(objective, settings, rule, mesh, shard_parameters)
        self._batch_size, self._parts = batch_size, parts
        self._place(members, rows, given, own)
        start = time.perf_counter()
        self._compile_init()
        self._run = _compiled(
            self._epochs, self._members, self.state_shapes, self.rows, self._given, self._own,
            self._count(1), out_shardings=(self._shardings, self._whole),
            donate_argnums=() if self._uneven else 1,
        )  # fmt: skip
        self.compile_seconds = time.perf_counter() - start

    def _epochs(self, members, state, rows, given, own, epochs):
        """`epochs` is traced: chunks of any length share one program."""
        size, batch_size = _examples(rows, own), self._batch_size
        steps = steps_per_epoch(size, batch_size) // self._parts

        each = functools.partial(jax.vmap, spmd_axis_name="member")

        # Loops over the steps of all members, not each member's loop over steps, which JAX would
        # trace until it knew which values in it differ between members. As a function of its own
        # the step, whose statistics' shapes the loops begin with, is traced once for both.
        @functools.partial(jax.jit, inline=True)
        @each
        def step(member, state, indices, given, own):
            batch = jax.tree.map(lambda leaf: leaf[indices], _joined(rows, own))
            return self._stepped(member, state, batch, given)

        def order(member, done):
            epoch, part = jnp.divmod(done // steps, self._parts)
            whole = epoch_order(member.seed, epoch, size, batch_size)
            return jax.lax.dynamic_slice_in_dim(whole, part * steps, steps)

        def told(member, tallied, given, own):
            probe = jax.tree.map(lambda leaf: leaf[:batch_size], _joined(rows, own))
            return self._told(member, tallied, steps, probe, given)

        if self._uneven:  # else the state lies as it should, its larger leaves split perhaps
            state = _filled(state, self._mesh.shape["member"])
            state = jax.lax.with_sharding_constraint(state, self._by_member)
        indices = jax.ShapeDtypeStruct(
            (len(members.seed), batch_size), np.int32, sharding=self._whole
        )
        none = _zeros(jax.eval_shape(step, members, state, indices, given, own)[1])

        def taken(tallied, indices):
            state, statistics = step(members, tallied[0], indices, given, own)
            return (state, jax.tree.map(jnp.add, tallied[1], statistics)), None

        def epoch(_, tallied):
            orders = jax.vmap(order, out_axes=1)(members, tallied[0].step)
            return jax.lax.scan(taken, (tallied[0], none), orders)[0]

        tallied = jax.lax.fori_loop(0, epochs, epoch, (state, none))
        ended = tallied[0], each(told)(members, tallied, given, own)
        return jax.tree.map(lambda leaf: leaf[: self._size], ended)

    def on(self, members: Member, rows: Any, *, given: Any = (), own: Any = ()) -> "Program":
        """The same compiled program for other members and rows of the same shapes."""
        other = copy.copy(self)
        other._place(members, rows, given, own)
        return other

    def _place(self, members: Member, rows: Any, given: Any, own: Any) -> None:
        size = _examples(rows, own)
        if size < self._batch_size:
            raise ValueError(f"{size} rows make no batch of {self._batch_size}: lower batch_size.")
        self._size, self.rows = len(members.seed), self._laid_out(rows)
        each = _filled((members, given, own), self._mesh.shape["member"])
        self._members, self._given, self._own = place(each, self._by_member)

    def _laid_out(self, rows: Any) -> Any:
        """Rows, or their shapes, on every device."""
        leaves = jax.tree.leaves(rows)
        if leaves and isinstance(leaves[0], jax.ShapeDtypeStruct):
            shaped = functools.partial(jax.ShapeDtypeStruct, sharding=self._whole)
            return jax.tree.map(lambda leaf: shaped(leaf.shape, leaf.dtype), rows)
        return place(rows, self._whole)

    @property
    def _uneven(self) -> bool:
        """Whether the members are filled up, as the devices do not divide them."""
        return self._size % self._mesh.shape["member"] > 0

    def run(self, state: State, epochs: int) -> tuple[State, Metrics]:
        """`epochs` epochs; `state` is donated. Metrics [M] are those of the last epoch."""
        count = self._count(epochs)
        with jax.transfer_guard("disallow"):
            return self._run(self._members, state, self.rows, self._given, self._own, count)

    def memory(self) -> int:
        """Bytes that `run` takes on a device: rows, states, and scratch."""
        used = self._run.memory_analysis()
        kept = used.argument_size_in_bytes + used.output_size_in_bytes - used.alias_size_in_bytes
        return kept + used.temp_size_in_bytes


class Streamed(_Compiled):
    """A stack of members whose rows are in host memory, or memory-mapped.

    The batches, and so the run, are those of `Program` on the same rows. They come in chunks of
    steps, one in training while the next is on its way to the device. Every device holds all
    members, and all devices share each batch.
    """

    def __init__(
        self,
        objective: Objective,
        settings: Optimisation,
        members: Member,
        rows: np.ndarray,
        batch_size: int,
        *,
        given: Any = (),
        rule: Rule = None,
        shard_parameters: bool = False,
    ):
        """Compiles; the arguments are those of `Program`, `rows` [N, ...] one array."""
        super().__init__(objective, settings, rule, mesh_for(1), shard_parameters)
        self._batch_size = batch_size
        self._steps = steps_per_epoch(len(rows), batch_size)
        self._place(members, rows, given)
        shape = (len(members.seed), batch_size, *rows.shape[1:])
        batch_bytes = int(np.prod(shape)) * rows.dtype.itemsize
        self._chunk_steps = int(np.clip(CHUNK_BYTES // batch_bytes, 1, self._steps))
        self._by_example_of_chunk = NamedSharding(self._mesh, PartitionSpec(None, None, "data"))

        start = time.perf_counter()
        self._compile_init()
        whole = self._whole
        step = jax.vmap(self._stepped, in_axes=(0, 0, None, 0))
        shapes = jax.eval_shape(step, self._members, self.state_shapes, self._probe, self._given)
        sums = self._no_sums = place(_zeros(shapes[1]), whole)
        chunk = jax.ShapeDtypeStruct(
            (shape[0], self._chunk_steps, *shape[1:]), rows.dtype,
            sharding=self._by_example_of_chunk,
        )  # fmt: skip
        self._advance = _compiled(
            self._chunk, self._members, self.state_shapes, sums, chunk, self._given, self._count(1),
            donate_argnums=1, out_shardings=(self._shardings, whole),
        )  # fmt: skip
        self._finish = _compiled(
            self._finished, self._members, self.state_shapes, sums, self._probe, self._given,
            out_shardings=whole,
        )  # fmt: skip
        self.compile_seconds = time.perf_counter() - start

    def _chunk(self, members, state, sums, chunk, given, count):
        """The first `count` steps of chunk [M, T, B, ...]."""

        def one(member, state, sums, chunk, given):
            def step(t, tallied):
                state, sums = tallied
                starts = state.step % self._steps == 0
                sums = jax.tree.map(lambda total: jnp.where(starts, 0.0, total), sums)
                state, statistics = self._stepped(member, state, chunk[t], given)
                return state, jax.tree.map(jnp.add, sums, statistics)

            return jax.lax.fori_loop(0, count, step, (state, sums))

        return jax.vmap(one)(members, state, sums, chunk, given)

    def _finished(self, members, state, sums, probe, given):
        def one(member, state, sums, given):
            return self._told(member, (state, sums), self._steps, probe, given)

        return jax.vmap(one)(members, state, sums, given)

    def on(self, members: Member, rows: np.ndarray, *, given: Any = ()) -> "Streamed":
        """The same compiled programs for other members and rows of the same shapes."""
        other = copy.copy(self)
        other._place(members, rows, given)
        return other

    def _place(self, members: Member, rows: np.ndarray, given: Any) -> None:
        self._seeds = np.asarray(members.seed).tolist()
        self._size, self.rows = len(self._seeds), rows
        self._members = place(members, self._whole)
        self._probe, self._given = place((rows[: self._batch_size], given), self._whole)

    def run(self, state: State, epochs: int) -> tuple[State, Metrics]:
        """`epochs` epochs; `state` is donated. Metrics [M] are those of the last epoch."""
        left = epochs * self._steps
        sums, before = self._no_sums, None
        feeder = Feeder(
            self.rows,
            seeds=self._seeds,
            batch_size=self._batch_size,
            steps_per_chunk=self._chunk_steps,
            start_step=int(jax.device_get(state.step).max()),  # of the members that go on
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        with feeder:
            while left > 0:
                chunk = jax.make_array_from_process_local_data(
                    self._by_example_of_chunk, next(feeder)
                )
                count = min(left, self._chunk_steps)
                state, sums = self._advance(
                    self._members, state, sums, chunk, self._given, self._count(count)
                )
                left -= count
                # Not more than the next chunk waits on the device while this one is trained on.
                jax.block_until_ready(before)
                before = sums
            return state, self._finish(self._members, state, sums, self._probe, self._given)
