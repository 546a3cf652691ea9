"""Training from rows that do not fit the device: `training.Trainer`, fed from disk.

The batches, and so the run, are those of `Trainer` on the same rows. They come in chunks of
steps, one in training while the next is on its way to the device.
"""

import copy
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from vaebal.data import Decode, steps_per_epoch
from vaebal.data.feeding import Feeder
from vaebal.models import GaussianVAE
from vaebal.training.devices import place
from vaebal.training.engine import (
    EpochMetrics,
    Member,
    Optimisation,
    TrainState,
    epoch_metrics,
    init_state,
    mesh_for,
    no_statistics,
    placed,
    tallied_step,
)
from vaebal.units import to_unit_pixels

# Bytes of a chunk. The device holds two of them, the host at most as many again as it gathers.
CHUNK_BYTES = 2**26


def host_mean_image(
    rows: np.ndarray, decode: Decode = to_unit_pixels, block: int = 256
) -> np.ndarray:
    """x_bar [D] of stored rows [N, ...], of which never more than a block is read at once."""
    decoded = jax.jit(decode)
    total = sum(
        np.asarray(decoded(np.asarray(rows[start : start + block]))).sum(0, dtype=np.float64)
        for start in range(0, len(rows), block)
    )
    return np.asarray(total / len(rows), jnp.result_type(float))


def _compiled(out_shardings, function, *arguments, **options):
    jitted = jax.jit(function, out_shardings=out_shardings, **options)
    return jitted.lower(*arguments).compile()


class StreamingTrainer:
    """What `training.fit` needs of a `Trainer`, for rows in host memory or memory-mapped.

    The programs are compiled ahead of time, as there. Every device holds all members, and all
    devices share each batch.

    Attributes:
      members: of arrays [M].
      state_shapes: of the stacked states, with shardings.
      compile_seconds: what compiling took.
    """

    def __init__(
        self,
        model: GaussianVAE,
        settings: Optimisation,
        members: Member,
        rows: np.ndarray,
        batch_size: int,
        decode: Decode = to_unit_pixels,
        shard_parameters: bool = False,
    ):
        """Compiles; reads `rows` [N, ...] once, a block at a time, for their mean.

        Args:
          members: stacked [M].
          decode: stored rows -> x [B, D] in [0, 1].
          shard_parameters: see `Trainer`.
        """
        mesh = mesh_for(1)
        self._replicated = NamedSharding(mesh, PartitionSpec())
        self._by_example = NamedSharding(mesh, PartitionSpec(None, None, "data"))
        self._batch_size, self._decode = batch_size, decode
        self._steps = steps_per_epoch(len(rows), batch_size)
        self._train(members)
        self._feed(rows)
        shape = (len(members.seed), batch_size, *rows.shape[1:])
        batch_bytes = int(np.prod(shape)) * rows.dtype.itemsize
        self._chunk_steps = int(np.clip(CHUNK_BYTES // batch_bytes, 1, self._steps))
        x_by_example = NamedSharding(mesh, PartitionSpec("data"))

        def init(members, data_mean):
            return jax.vmap(lambda member: init_state(model, settings, member, data_mean))(members)

        def begin(member):
            return no_statistics(model)

        def advance(members, state, sums, chunk, count):
            """The first `count` steps of chunk [M, T, B, ...]."""

            def one(member, state, sums, chunk):
                def step(t, tallied):
                    state, sums = tallied
                    starts = state.step % self._steps == 0
                    sums = jax.tree.map(lambda total: jnp.where(starts, 0.0, total), sums)
                    x = jax.lax.with_sharding_constraint(decode(chunk[t]), x_by_example)
                    return tallied_step(model, settings, member, (state, sums), x)

                return jax.lax.fori_loop(0, count, step, (state, sums))

            return jax.vmap(one)(members, state, sums, chunk)

        def finish(members, state, sums, probe):
            def one(member, *tallied):
                return epoch_metrics(model, member, tallied, self._steps, decode(probe))

            return jax.vmap(one)(members, state, sums)

        start = time.perf_counter()
        shapes = jax.eval_shape(init, self.members, self._data_mean)
        self.state_shapes = placed(shapes, mesh, split=shard_parameters)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.state_shapes)
        whole = self._replicated
        self._init = _compiled(shardings, init, self.members, self._data_mean)
        sums = self._no_sums = _compiled(whole, jax.vmap(begin), self.members)(self.members)
        chunk = jax.ShapeDtypeStruct(
            (shape[0], self._chunk_steps, *shape[1:]), rows.dtype, sharding=self._by_example
        )
        self._advance = _compiled(
            (shardings, whole), advance,
            self.members, self.state_shapes, sums, chunk, self._count(1), donate_argnums=1,
        )  # fmt: skip
        self._finish = _compiled(whole, finish, self.members, self.state_shapes, sums, self._probe)
        self.compile_seconds = time.perf_counter() - start

    def _train(self, members: Member) -> None:
        self._seeds = np.asarray(members.seed).tolist()
        self.members = place(members, self._replicated)

    def _feed(self, rows: np.ndarray) -> None:
        self._rows = rows
        on_host = rows[: self._batch_size], host_mean_image(rows, self._decode)
        self._probe, self._data_mean = place(on_host, self._replicated)

    def _count(self, steps: int) -> Array:
        return jax.make_array_from_process_local_data(self._replicated, np.int32(steps), ())

    def on(self, members: Member, rows: np.ndarray) -> "StreamingTrainer":
        """The same compiled programs for other members and rows of the same shapes."""
        other = copy.copy(self)
        other._train(members)
        if rows is not self._rows:  # the mean costs a pass over them
            other._feed(rows)
        return other

    def init(self) -> TrainState:
        """Every member's state at step 0, stacked [M, ...]."""
        return self._init(self.members, self._data_mean)

    def run(self, state: TrainState, epochs: int) -> tuple[TrainState, EpochMetrics]:
        """`epochs` epochs; `state` is donated. Metrics [M] are those of the last epoch."""
        left = epochs * self._steps
        sums, before = self._no_sums, None
        feeder = Feeder(
            self._rows,
            seeds=self._seeds,
            batch_size=self._batch_size,
            steps_per_chunk=self._chunk_steps,
            start_step=int(jax.device_get(state.step).max()),  # of the members that go on
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        with feeder:
            while left > 0:
                chunk = jax.make_array_from_process_local_data(self._by_example, next(feeder))
                count = min(left, self._chunk_steps)
                state, sums = self._advance(self.members, state, sums, chunk, self._count(count))
                left -= count
                # Not more than the next chunk waits on the device while this one is trained on.
                jax.block_until_ready(before)
                before = sums
            return state, self._finish(self.members, state, sums, self._probe)
