"""TensorBoard: one event file of the whole job, over all its attempts, below the job's folder."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

from app.trackers._base import Point, SentState, TrackedJob, Tracker


class Tensorboard(Tracker):
    """An event file."""

    kind = "tensorboard"
    title = "TensorBoard"
    pause_seconds: ClassVar[float] = 30.0

    def send(self, job: TrackedJob, points: Sequence[Point], state: SentState, beat: Callable[[], None]) -> SentState:
        """Append to the file. What a death left behind its recorded end is cut off first."""
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder = job.folder / "tensorboard"
        folder.mkdir(parents=True, exist_ok=True)
        path, bytes_ = folder / f"events.out.tfevents.{int(job.started_at):010d}.luthier", int(state.get("bytes", 0))
        with path.open("r+b" if path.exists() else "w+b") as file:
            if file.seek(0, os.SEEK_END) < bytes_:  # it was removed or cut by somebody: what is left is kept, and the rest goes on behind
                bytes_ = file.tell()
            file.truncate(bytes_)
            file.seek(bytes_)
            writer = RecordWriter(file)
            for record in _records(job, points, state, new=bytes_ == 0):
                writer.write(record.SerializeToString())
            file.flush()
            os.fsync(file.fileno())
            return {"bytes": file.tell(), "url": "", "folder": str(folder), "status": job.status}


def _records(job: TrackedJob, points: Sequence[Point], state: SentState, *, new: bool) -> Iterator[Any]:
    """The protobuf events: version and settings of a new file, the figures, and the end where it came."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2, summary_v2

    if new:
        yield Event(wall_time=job.started_at, file_version="brain.Event:2")
        told = {**job.parameters, "luthier_url": job.url}
        yield Event(wall_time=job.started_at, summary=summary_v2.hparams_pb(told, trial_id=job.public_id, start_time_secs=job.started_at))
    for point in points:
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in point.values.items()]
        yield Event(wall_time=point.at, step=point.step, summary=Summary(value=values))
    if job.ended and state.get("status") != job.status:
        ended, how = job.ended_at or time.time(), "STATUS_SUCCESS" if job.status == "succeeded" else "STATUS_FAILURE"
        end = plugin_data_pb2.SessionEndInfo(status=api_pb2.Status.Value(how), end_time_secs=ended)
        about = metadata.create_summary_metadata(plugin_data_pb2.HParamsPluginData(session_end_info=end))
        value = Summary.Value(tag=metadata.SESSION_END_INFO_TAG, metadata=about, tensor=metadata.NULL_TENSOR)
        yield Event(wall_time=ended, summary=Summary(value=[value]))
