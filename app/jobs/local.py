"""Runs a job in this process: no studio, no database, no queue. The body of `luthier train --here`.

The model is a starter's name or a folder, the rows are a file; both are named in the request as usual. The result is under
`runs/` of the data folder, as a job's would be.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from app import events, graders
from app.datasets import ingest
from app.errors import BadData, BadField, StudioError
from app.graders import Grader
from app.jobs import request as job_request
from app.jobs import spec_builder
from app.models import starters
from app.objectives import OBJECTIVES, DrawnSettings, Task
from app.planning.reinforcement import refuse_drawn, refuse_server
from app.planning.schedule import held_out_share
from app.run_settings import RunSettings
from app.settings import get_settings
from app.shapes import Shape, shape_of
from app.spec import DatasetRef, JobSpec, Kind, ModelRef

KNOWN = frozenset(
    {"model", "training_file", "validation_file", "task", "strategy", "run", "preference", "split", "graders", "name", "seed"}
)


def spec_of(order: Mapping[str, Any], folder: Path) -> JobSpec:
    """The spec of a request whose paths are relative to `folder`; its rows are parsed on the way.

    Raises BadField naming the field that is wrong, or BadData for rows that cannot be parsed.
    """
    for name in order:
        if name not in KNOWN:
            raise BadField(
                f"{name!r} has no meaning without a studio.", hint=f"Remove it; known are {', '.join(sorted(KNOWN))}.", param=name
            )
    for name in ("model", "training_file"):
        if not isinstance(order.get(name), str):
            raise BadField(f"{name} is missing.", hint=f"Write `{name}: …` into the file.", param=name)
    model = model_of(order["model"], folder)
    data, task = rows_of(order["training_file"], folder, "training_file")
    held_out = rows_of(order["validation_file"], folder, "validation_file")[0] if order.get("validation_file") else None
    strategy = job_request.read_strategy(order.get("strategy") or {"name": "lora"})
    task = order.get("task") or task
    settings = dict(order.get("run") or {})
    if order.get("seed") is not None:
        settings.setdefault("seed", order["seed"])
    if held_out is None:
        settings.setdefault("validation_fraction", held_out_share(data.rows))
    try:
        run = RunSettings.model_validate(settings)
    except ValidationError as error:
        raise job_request.bad_field(error, "run") from None
    reason = strategy.unavailable(model.shape, task=task, cuda=spec_builder.has_gpu(run.device))
    if reason:
        raise BadField(reason, hint="Choose another method or model.", param="strategy")
    about = {"name": order.get("name") or f"{data.name} with {strategy.title}", "task": task, "model": model, "dataset": data, "run": run}
    rest = {"split": order["split"]} if order.get("split") else {}
    if task in OBJECTIVES:
        read = [_without_model(one, "graders") for one in order.get("graders") or []]
        graded = spec_builder.trainable_graders(read, task)
        if OBJECTIVES[task].rewards:
            own = order.get("preference") or {}
            order = {
                **order,
                "preference": {**own, "grader": graders.to_json(_without_model(own.get("grader") or {}, "preference.grader"))},
            }
        if OBJECTIVES[task].teaches:
            raise BadField("Without a studio there is no teacher to distill.", hint="Train in the studio.", param="task")
        spec_builder.check_graded(run, graded, validated_elsewhere=held_out is not None, reward=OBJECTIVES[task].rewards)
        rest["graders"] = graded
        if OBJECTIVES[task].settings is None and order.get("preference"):
            raise BadField(
                f"The settings “preference” mean nothing for {task}.", hint="Remove them, or set another task.", param="preference"
            )
        rest["preference"] = drawn = job_request.read_objective_settings(task, order.get("preference") or {})
        if isinstance(drawn, DrawnSettings):
            refuse_drawn(strategy, run, drawn, model.shape)
        refuse_server(strategy, run, drawn, served=False, processes=1)
    try:
        return JobSpec.model_validate({**about, "validation": held_out, "strategy": strategy, **rest})
    except ValidationError as error:
        raise job_request.bad_field(error) from None


def _without_model(given: Any, param: str) -> Grader:
    """A grader that asks no model. Raises BadField."""
    found = graders.read(given)
    if any(True for _ in found.models()):
        raise BadField(
            f"The grader {found.name} asks a model, and without a studio there is none to ask.",
            hint="Take a grader without a model, or train in the studio.",
            param=param,
        )
    return found


def model_of(name: str, folder: Path) -> ModelRef:
    """A folder saved by save_pretrained(), or a starter, which is fetched when it is missing."""
    path = (folder / name).resolve()
    if not path.is_dir():
        path = starters.ensure(name).resolve()
    try:
        config = json.loads((path / "config.json").read_text())
    except (OSError, ValueError):
        raise BadField(f"{path} holds no model.", hint="Name a folder saved by save_pretrained().", param="model") from None
    weights = sorted(path.glob("*.safetensors"))
    if not weights:
        raise BadField(f"{path} holds no safetensors file.", hint="Save the model with safetensors.", param="model")
    about = hashlib.sha256(json.dumps([[w.name, w.stat().st_size, w.stat().st_mtime_ns] for w in weights]).encode())
    shape = shape_of(config)
    key = uuid.uuid5(uuid.NAMESPACE_URL, path.as_uri())
    return ModelRef(id=key, name=Path(name).name, kind=kind_of(path, shape), path=str(path), revision=about.hexdigest(), shape=shape)


def kind_of(path: Path, shape: Shape) -> Kind:
    """The kind of a model: one with a chat template holds conversations; one without continues text."""
    if shape.architecture == "encoder":
        return "encoder"
    about = path / "tokenizer_config.json"
    template = (path / "chat_template.jinja").is_file() or (about.is_file() and "chat_template" in json.loads(about.read_text()))
    return "dialogue" if template else "generic"


def rows_of(name: str, folder: Path, param: str) -> tuple[DatasetRef, Task]:
    """The valid rows of a file, kept as Parquet under the hash of its bytes, and their task."""
    path = (folder / name).resolve()
    if not path.is_file():
        raise BadField(f"{param} names {path}, which is not a file.", hint="Write a path relative to the YAML file.", param=param)
    key = uuid.uuid5(uuid.NAMESPACE_OID, hashlib.sha256(path.read_bytes()).hexdigest())
    kept = get_settings().folder("rows", str(key)) / "rows.parquet"
    found = ingest.read({"path": str(path), "filename": path.name, "rows": str(kept)}, lambda _: None)
    if not found["good_rows"]:
        raise BadData(f"None of the {found['rows']} rows of {path.name} is valid.", hint="Fix the file, or look at it in the studio.")
    where = kept.relative_to(get_settings().data_dir).as_posix()
    ref = DatasetRef(id=key, name=path.stem, path=where, sha256=found["sha256"], format=found["format"], rows=found["good_rows"])
    return ref, found["task"]


def train(spec: JobSpec, *, profile: bool = False) -> Iterator[events.TrainerEvent]:
    """The events of the training process, to its end. Raises its failure as a StudioError. Ctrl-C lets it save and leave."""
    folder = f"runs/alone-{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}"
    attempt = get_settings().folder(*folder.split("/"), "a1")
    path = attempt / "spec.json"
    path.write_text(spec.model_dump_json())
    read_end, write_end = os.pipe()
    command = [sys.executable, "-m", "worker.supervision.local", "--spec", str(path), "--folder", f"{folder}/a1", "--resume-from", folder]
    command += ["--events-fd", str(write_end), *(["--profile"] if profile else [])]
    with (attempt / "trainer.log").open("wb") as log:
        process = subprocess.Popen(command, pass_fds=[write_end], stdout=log, stderr=log)
    os.close(write_end)
    failed: events.Failed | None = None
    with os.fdopen(read_end, "rb") as pipe:
        for line in pipe:
            event = events.read_line(line)
            failed = event if isinstance(event, events.Failed) else failed
            yield event
    if process.wait() and failed is None:
        raise StudioError(f"The training process ended with {process.returncode}.", hint=f"Read {attempt / 'trainer.log'}.")
    if failed is not None:
        raise StudioError(failed.message, hint=failed.hint or f"Read {attempt / 'trainer.log'}.")
