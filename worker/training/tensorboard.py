"""The curves of a job as TensorBoard files, beside the events. A fault of theirs is told once and never stops a job."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from app import events
from app.trackers import figures

FLUSH_SECONDS = 30


@contextlib.contextmanager
def curves(folder: Path, say: Callable[[events.Log], object]) -> Iterator[Callable[[events.TrainerEvent], None]]:
    """Takes each event of an attempt and writes its figures below `folder`."""
    opened: list[Any] = []

    def give_up(error: Exception) -> None:
        opened.clear()
        say(events.Log(level="warn", message=f"No more TensorBoard files are written, training goes on: {type(error).__name__}: {error}"))

    def note(event: events.TrainerEvent) -> None:
        if opened and (values := figures(event)):
            try:
                opened[0].add_event(_entry(event, values))
            except Exception as error:
                give_up(error)

    try:
        opened.append(_writer(folder))
    except Exception as error:
        give_up(error)
    try:
        yield note
    finally:
        with contextlib.suppress(Exception):  # whatever it says, the result is on disk and told
            opened[0].close()


def _writer(folder: Path) -> Any:
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    return EventFileWriter(str(folder), flush_secs=FLUSH_SECONDS)


def _entry(event: Any, values: dict[str, float]) -> Any:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary

    summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])
    return Event(summary=summary, step=event.step, wall_time=time.time())
