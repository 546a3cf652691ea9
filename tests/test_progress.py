"""TensorBoard's scalars: whole where they can be written, and nobody's end where they cannot."""

import resource
import struct

import numpy as np
import pytest
from tensorboardX import RecordWriter
from tensorboardX.proto.event_pb2 import Event

from vaebal.training import progress as module
from vaebal.training.progress import Progress, describe

EPOCHS = 200
NAMES = ("loss", "squared_error", "gamma", "active", "residual_variance", "stopped")


def events_of(file) -> list[Event]:
    octets, events = file.read_bytes(), []
    while octets:
        (size,) = struct.unpack("<Q", octets[:8])
        events.append(Event.FromString(octets[12 : 12 + size]))
        octets = octets[16 + size :]
    return events


def metrics(epoch: int) -> dict[str, np.ndarray]:
    """Of two members; the second's have a tenth of the first's values, and one that is NaN."""
    values = {name: np.array([epoch, epoch / 10]) for name in NAMES}
    return values | {"residual_variance": np.array([np.nan, epoch])}


def train(directory, between=lambda epoch: None) -> None:
    with Progress(1, directory) as progress:
        progress.start("some", ["a", "b"], EPOCHS)
        report = progress.reporter(100)
        for epoch in range(1, EPOCHS + 1):
            between(epoch)
            report(epoch, 1, metrics(epoch), 0.1)
        progress.done()


def assert_whole(directory) -> None:
    for member, scale in (("a", 1), ("b", 10)):
        (file,) = (directory / member).iterdir()
        first, *others = events_of(file)
        assert first.file_version == "brain.Event:2"
        assert [event.step for event in others] == list(range(1, EPOCHS + 1))
        for event in others:
            got = {value.tag: value.simple_value for value in event.summary.value}
            assert got["loss"] == pytest.approx(event.step / scale)
            assert set(got) == set(NAMES) - {"stopped"} - (
                {"residual_variance"} if member == "a" else set()
            )


def test_files_are_as_tensorboardx_frames_its_own(tmp_path):
    train(tmp_path / "ours")
    assert_whole(tmp_path / "ours")
    (file,) = (tmp_path / "ours" / "a").iterdir()
    writer = RecordWriter(str(tmp_path / "theirs"))
    for event in events_of(file):
        writer.write(event.SerializeToString())
    writer.close()
    assert (tmp_path / "theirs").read_bytes() == file.read_bytes()


def test_a_full_disk_is_told_once_and_what_it_refused_comes_when_there_is_space(
    tmp_path, monkeypatch, caplog
):
    """No file may grow beyond 1,000 bytes between the fifth and the last epoch but nine."""
    monkeypatch.setattr(module, "SECONDS_BETWEEN_WRITES", 0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def between(epoch):
        if epoch == 5:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        if epoch == EPOCHS - 9:
            (file,) = (tmp_path / "a").iterdir()
            assert file.stat().st_size == 1000  # half a record
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    try:
        train(tmp_path, between)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    (said,) = caplog.messages
    assert said == "TensorBoard's scalars cannot be written now ([Errno 27] File too large)."
    assert_whole(tmp_path)


def test_a_run_ends_well_where_nothing_of_it_can_ever_be_written(tmp_path, caplog):
    """A file lies where the folder should."""
    (tmp_path / "file").write_text("")
    train(tmp_path / "file")
    assert len(caplog.messages) == 1


def test_a_line_tells_medians_ranges_and_how_many_stopped():
    told = {
        "loss": np.array([1.0, 3.0, 2.0, 9.0]),
        "active": np.array([2, 5, 3, 9]),
        "stopped": np.array([-1, -1, -1, 4]),
    }
    assert describe(told) == "loss 2.0  active 2–5  1 stopped"
    assert describe({**told, "stopped": np.zeros(4)}) == "4 stopped"
