"""Weights & Biases, by its own package (the extra `trackers`), in a short-lived child that gets the figures and the key and nothing else."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field, StringConstraints

from app.errors import BadField, Unavailable
from app.kit import addresses, child_process
from app.languages import gettext
from app.settings import get_settings
from app.trackers._base import Point, SentState, TrackedJob, Tracker, chosen_server

OFFLINE = "offline"
SECONDS = 180.0
"""How long one sending may take."""


class Wandb(Tracker):
    """A run in a project of Weights & Biases."""

    kind = "wandb"
    title = "Weights & Biases"
    pause_seconds: ClassVar[float] = 60.0

    project: Annotated[str, StringConstraints(min_length=1, max_length=128, pattern=r"^[^/\\#?%:]+$")] = "luthier"
    name: Annotated[str, StringConstraints(max_length=128)] | None = Field(None, description="Name of the run; otherwise that of the job.")
    entity: Annotated[str, StringConstraints(max_length=128)] | None = Field(None, description="Team or person; otherwise that of the key.")
    tags: list[Annotated[str, StringConstraints(min_length=1, max_length=64)]] | None = Field(None, max_length=50)

    def check(self) -> None:
        if importlib.util.find_spec("wandb") is None:
            raise BadField(
                gettext("This studio sends nothing to wandb: its package is missing."),
                hint=gettext('Whoever runs the studio installs "luthier[trackers]" and sets LUTHIER_WANDB.'),
                param="integrations",
            )
        if not self.waits_for_end() and not chosen_server(self.kind, None).key:
            raise BadField(
                gettext("This studio sends nothing to wandb: it has no key."),
                hint=gettext("Whoever runs the studio sets LUTHIER_WANDB=https://:KEY@api.wandb.ai."),
                param="integrations",
            )

    def waits_for_end(self) -> bool:
        """Offline, a run is written to a folder, which `wandb sync` sends; whole runs alone, so that there is one for each job."""
        return get_settings().wandb.strip() == OFFLINE

    def send(self, job: TrackedJob, points: Sequence[Point], state: SentState, beat: Callable[[], None]) -> SentState:
        self.check()
        folder = job.folder / "wandb"
        draft = folder / "draft"
        shutil.rmtree(draft, ignore_errors=True)  # of a sending that was killed
        draft.mkdir(parents=True)
        try:
            url = self._child(job, points, draft, beat)
            written = [_kept(folder, found) for found in sorted((draft / "wandb").glob("offline-run-*"))]
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        folders = [*state.get("folders", []), *map(str, written)]
        return {"url": url, "status": job.status, **({"folder": str(folder), "folders": folders} if folders else {})}

    def _child(self, job: TrackedJob, points: Sequence[Point], draft: Path, beat: Callable[[], None]) -> str:
        """Send from a process that ends with this one; the address of the run. Raises Unavailable with its last words."""
        order, answer = draft / "order.json", draft / "answer.json"
        order.write_text(json.dumps(self._order(job, points)))
        command = [sys.executable, "-m", "app.trackers._wandb_child", str(order), str(answer)]
        code, output = child_process.run(command, self._environment(draft), beat, SECONDS)
        if code != 0 or not answer.exists():
            key = "" if self.waits_for_end() else chosen_server(self.kind, None).key or ""
            words = (output.strip().splitlines() or ["it said nothing"])[-1]
            words = words.replace(key, "…") if key else words
            raise Unavailable(f"wandb sent nothing: {words[:300]}", hint="The studio tries again.", code="tracker_refused")
        return str(json.loads(answer.read_text())["url"] or "")

    def _order(self, job: TrackedJob, points: Sequence[Point]) -> dict[str, object]:
        return {
            "init": {
                "project": self.project, "entity": self.entity, "name": self.name or job.name, "tags": self.tags, "id": job.key.hex,
                "resume": "allow", "config": {**job.parameters, "luthier_url": job.url, "luthier_job": job.public_id}, "notes": job.url,
                "job_type": "fine-tuning",
            },
            "logs": [{"step": point.step, "at": point.at, "values": point.values} for point in points],
            "exit_code": {"succeeded": 0, "running": 0}.get(job.status, 1),
            "summary": {"luthier/status": job.status, **({"luthier/error": job.error} if job.error else {})},
        }  # fmt: skip

    def _environment(self, draft: Path) -> dict[str, str]:
        found = {
            "PATH": "/usr/bin:/bin", "HOME": str(draft), "TMPDIR": str(draft), "LANG": "C.UTF-8",
            "WANDB_DIR": str(draft), "WANDB_SILENT": "true", "WANDB_CONSOLE": "off", "WANDB_DISABLE_GIT": "true", "WANDB_DISABLE_CODE": "true",
            "WANDB_ERROR_REPORTING": "false",
            **{name: os.environ[name] for name in ("PYTHONPATH", "LUTHIER_STUDIO") if name in os.environ},
        }  # fmt: skip
        if self.waits_for_end():
            return {**found, "WANDB_MODE": OFFLINE}
        server = chosen_server(self.kind, None)
        try:
            addresses.pinned(server.url)
        except OSError as fault:
            raise Unavailable(f"{self.title} at {server.host} cannot be reached ({fault}).", hint="The studio tries again.") from None
        return {**found, "WANDB_MODE": "online", "WANDB_BASE_URL": server.url, "WANDB_API_KEY": server.key or ""}


def _kept(folder: Path, found: Path) -> Path:
    return found.rename(Path(tempfile.mkdtemp(prefix="", dir=folder)) / found.name)
