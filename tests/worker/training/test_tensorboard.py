"""TensorBoard files beside a real attempt, and an attempt that cannot write them."""

from __future__ import annotations

import io
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from app import events
from tests.factories import chat_rows
from tests.lives import finished, steps
from tests.worker.orders import order, put_dataset, put_model
from worker import run
from worker.training import tensorboard


@pytest.fixture
def own_signals() -> Iterator[None]:
    """An attempt takes the signals of its process, which here is everyone's."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("own_signals")
@pytest.mark.parametrize("fault", [False, True])
def test_an_attempt_ends_well_with_and_without_its_files(data_dir: Path, tiny_model: Path, fault: bool):
    spec = order(put_model(tiny_model), put_dataset(chat_rows(12)), max_steps=3, samples=0, forgetting=False)
    folder, pipe = data_dir / "runs" / "a1", io.StringIO()
    folder.mkdir(parents=True)
    if fault:
        (folder / "tensorboard").write_text("in the way")
    assert run.attempt(spec, folder, folder.parent, pipe) == 0
    said = [events.read_line(line) for line in pipe.getvalue().splitlines()]
    assert isinstance(said[-1], events.Finished)
    warned = [e.message for e in said if isinstance(e, events.Log) and "TensorBoard" in e.message]
    assert len(warned) == fault
    if not fault:
        assert {"train/loss", "validation/loss"} <= set(read(folder / "tensorboard"))


def read(folder: Path) -> dict[str, list[float]]:
    """Tag → values, as TensorBoard itself reads them."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    found: dict[str, list[float]] = {}
    for file in folder.iterdir():
        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                found.setdefault(value.tag, []).append(value.tensor.float_val[0])
    return found


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's own thread dies of it
def test_files_that_break_in_the_middle_are_told_of_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tensorboard, "FLUSH_SECONDS", 0)
    told: list[events.Log] = []
    with tensorboard.curves(tmp_path / "tensorboard", told.append) as note:
        shutil.rmtree(tmp_path / "tensorboard")
        for event in [*steps(1, 200), finished()]:
            note(event)
    assert [t.level for t in told] == ["warn"] and "training goes on" in told[0].message
