"""A job's configuration outside the form: as text to copy, as a file that runs again, and back into the form.

The file of a job holds its model, its data, its method and every setting with its value, including defaults, so that it gives the
same job when defaults have changed.
"""

from __future__ import annotations

import json
import pprint
import shlex
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from pydantic import BaseModel
from sqlalchemy.orm import Session

from app import formats
from app.datasets import service as datasets
from app.errors import BadData, BadField, NotFound
from app.jobs import request as job_request
from app.jobs import resources_form
from app.jobs import service as jobs
from app.jobs.request import JobRequest
from app.kit import ids
from app.kit.forms import as_text
from app.languages import gettext
from app.machines.placement import Resources
from app.objectives import OBJECTIVES
from app.older_settings import renamed
from app.spec import JobSpec, usual_learning_rate
from app.strategies import STRATEGIES
from app.tables import Dataset, Job, User

MAX_FILE = 100_000
"""Bytes of a configuration that is loaded into the form; a complete one has three thousand."""
KEYS = frozenset(
    {
        "name",
        "model",
        "training_file",
        "dataset_id",
        "validation_file",
        "validation_dataset_id",
        "split",
        "preset",
        "strategy",
        "run",
        "preference",
        "graders",
        "seed",
        "task",
        "priority",
        "resources",
    }
)


# As a file ------------------------------------------------------------------------------------------------------------


def of_job(job: Job) -> str:
    return as_file(JobSpec.model_validate(job.spec))


def as_file(spec: JobSpec) -> str:
    """Everything that decides the job, as YAML for `luthier train`. Default values are marked."""
    named = {
        "name": spec.name,
        **({"task": spec.task} if _chosen(spec.task, spec.dataset.format) else {}),
        "model": spec.model.name,
        "dataset_id": ids.public(ids.DATASET, spec.dataset.id),
        **({"validation_dataset_id": ids.public(ids.DATASET, spec.validation.id)} if spec.validation else {}),
        **({"split": spec.split.model_dump(exclude_none=True)} if spec.split else {}),
    }
    own = usual_learning_rate(spec.strategy, spec.task, spec.run.optimizer)
    parts = [
        _yaml(named),
        f"strategy:\n  name: {spec.strategy.name}\n" + _settings(spec.strategy),
        "run:\n" + _settings(spec.run, learning_rate=own),
    ]
    if spec.preference is not None:
        parts.append("preference:\n" + _settings(spec.preference))
    if spec.graders:
        parts.append(_yaml({"graders": list(spec.graders)}))
    return "# Run this job again: luthier train job.yaml\n" + "".join(parts)


def _chosen(task: str, format_: str) -> bool:
    """Whether the rows are usually for another objective than this one."""
    own = formats.objectives_of(format_) if format_ else []
    return bool(own) and own[0].name != task


def _settings(settings: BaseModel, **defaults: Any) -> str:
    """A line for each field, with default values marked. Fields that are off are comments, since null means the default."""
    lines = []
    for name, info in type(settings).model_fields.items():
        if name == "name":
            continue
        value, default = getattr(settings, name), defaults.get(name, info.get_default(call_default_factory=True))
        line = textwrap.indent(_yaml({name: list(value) if isinstance(value, tuple) else value}).rstrip(), "  ")
        lines.append(f"  # {name}: none" if value is None else f"{line}  # default" if value == default else line)
    return "\n".join(lines) + "\n"


def _yaml(values: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True, width=1000)


# From a file, and from a job ------------------------------------------------------------------------------------------


def read(session: Session, user: User, file: bytes) -> dict[str, str]:
    """A configuration file as the filled form. Raises BadData for what is no such file, BadField or NotFound for errors in it;
    values out of range are left to the form, which shows them at their fields."""
    try:
        body = yaml.safe_load(file.decode("utf-8"))
    except UnicodeDecodeError:
        raise BadData(gettext("The file is not text in UTF-8."), hint=gettext("Choose the YAML file of a run.")) from None
    except yaml.YAMLError as error:
        raise BadData(gettext("The file is not YAML: %(error)s", error=str(error)[:200]), hint=gettext("Fix the line it names.")) from None
    if not isinstance(body, dict):
        raise BadData(
            gettext("The file holds no settings."), hint=gettext("It needs at least `model:` and `dataset_id:` or `training_file:`.")
        )
    if unknown := [str(key) for key in body if key not in KEYS]:
        raise BadField(
            gettext("The form has no %(key)s.", key=repr(unknown[0][:60])),
            hint=gettext("Remove it. Known are %(names)s.", names=", ".join(sorted(KEYS))),
            param=unknown[0][:60],
        )
    order = job_request.read_order(body)
    dataset, validation = (
        _dataset(session, user, *named)
        for named in ((order.dataset_id, order.training_file), (order.validation_dataset_id, order.validation_file))
    )
    run = order.run | ({"seed": order.seed} if order.seed is not None else {})
    settings = {
        "strategy": order.strategy,
        "run": run,
        "preference": order.preference or {},
        "split": order.split.model_dump() if order.split else {},
    }
    return {
        "model": order.model,
        **({"dataset": ids.public(ids.DATASET, dataset.id)} if dataset else {}),
        **({"validation": ids.public(ids.DATASET, validation.id)} if validation else {}),
        "strategy": str(order.strategy.get("name", "lora")),
        **({"preset": order.preset} if order.preset else {}),
        **({"objective": order.task} if order.task else {}),
        **({"name": order.name} if order.name else {}),
        **({"priority": order.priority} if order.priority else {}),
        **resources_form.typed_from(order.resources),
        **_graders(order.graders or []),
        **{
            f"{part}.{name}": as_text(value)
            for part, values in settings.items()
            for name, value in values.items()
            if value is not None and (part, name) != ("strategy", "name")
        },
    }


def _graders(given: Sequence[str | dict[str, Any]]) -> dict[str, str]:
    """The inputs of graders: one for each saved one, and one for all that are written out."""
    written = [one for one in given if isinstance(one, dict)]
    saved = {f"grader.{one}": "on" for one in given if isinstance(one, str)}
    return saved | ({"graders": json.dumps(written, ensure_ascii=False)} if written else {})


def _dataset(session: Session, user: User, dataset_id: Any, file: str | None) -> Dataset | None:
    if dataset_id is not None:
        return datasets.get(session, user, dataset_id)
    if file is None:
        return None
    if not file.startswith("file-"):
        raise BadField(
            gettext("The file names data on a disk: %(file)s.", file=file[:100]),
            hint=gettext("Upload it and write its `dataset_id:` here, or run the file with `luthier train`."),
            param="training_file",
        )
    return datasets.for_file(session, user, ids.parse(ids.FILE, file, param="training_file"))


def typed_from(job: Job) -> dict[str, str]:
    """A job's request as the filled form, for cloning it."""
    spec = job.spec
    strategy = {k: as_text(v) for k, v in spec["strategy"].items() if k != "name"}
    # The method's own learning rate is left empty, so that it follows when another method is chosen.
    default = usual_learning_rate(STRATEGIES[spec["strategy"]["name"]], spec["task"], spec["run"].get("optimizer", "adamw"))
    own_rate = "learning_rate" if spec["run"].get("learning_rate") == default else None
    return {
        "model": spec["model"]["name"],
        "dataset": ids.public(ids.DATASET, job.dataset_id),
        **({"validation": ids.public(ids.DATASET, job.validation_dataset_id)} if job.validation_dataset_id else {}),
        "strategy": spec["strategy"]["name"],
        **({"objective": spec["task"]} if _chosen(spec["task"], spec["dataset"]["format"]) else {}),
        "name": job.name,
        **({"priority": job.priority} if job.priority != "normal" else {}),
        **resources_form.typed_from(Resources.model_validate(job.order.get("resources") or {})),
        **_graders(spec.get("graders") or []),
        **{f"strategy.{name}": value for name, value in strategy.items()},
        **{f"run.{name}": as_text(value) for name, value in renamed(spec["run"]).items() if value is not None and name != own_rate},
        **{f"split.{name}": as_text(value) for name, value in (spec.get("split") or {}).items() if value is not None},
        **{f"preference.{name}": as_text(value) for name, value in _objective_settings(spec).items()},
    }


def _objective_settings(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a job's objective, without those that follow from the others."""
    kind = OBJECTIVES[spec["task"]].settings
    return kind.model_validate(spec["preference"]).chosen() if kind and spec.get("preference") else {}


def typed_of(session: Session, user: User, public_id: str) -> dict[str, str]:
    """`typed_from` a job named by its public id; empty when there is none."""
    try:
        return typed_from(jobs.get(session, user, ids.parse(ids.JOB, public_id)))
    except NotFound:
        return {}


# As text to copy ------------------------------------------------------------------------------------------------------


def body_of(session: Session, spec_dataset: Dataset, order: JobRequest) -> dict[str, Any]:
    """The body of `POST /v1/fine_tuning/jobs`, which is also what `luthier train` reads."""
    if spec_dataset.file_id is not None and spec_dataset.edits is None:  # a file's id stands for its unedited dataset
        data = {"training_file": ids.public(ids.FILE, spec_dataset.file_id)}
    else:
        data = {"dataset_id": ids.public(ids.DATASET, spec_dataset.id)}
    split = order.split.model_dump(exclude_none=True) if order.split else None
    body = {
        "model": order.model,
        **data,
        "validation_dataset_id": ids.public(ids.DATASET, order.validation_dataset_id) if order.validation_dataset_id else None,
        "task": order.task,
        "preset": order.preset,
        "strategy": order.strategy,
        "run": order.run,
        "preference": order.preference,
        "split": split,
        "graders": order.graders,
        "name": order.name,
        "priority": order.priority,
        "resources": order.resources.model_dump(mode="json", exclude_none=True) if order.resources else None,
    }
    return {key: value for key, value in body.items() if value not in (None, {})}


def as_curl(url: str, body: Mapping[str, Any]) -> str:
    """The command that posts a body as JSON, with the key from the environment."""
    return (
        f"curl {url} \\\n"
        '  -H "Authorization: Bearer $LUTHIER_API_KEY" -H "Content-Type: application/json" \\\n'
        f"  -d {shlex.quote(json.dumps(body, indent=2, ensure_ascii=False))}"
    )


def as_texts(body: Mapping[str, Any], base_url: str) -> dict[str, str]:
    """The job to copy: as a YAML file of the chosen settings, a curl command and a Python program. Each of them works as it is,
    with the key of an account in `LUTHIER_API_KEY`."""
    ours = {
        key: body[key]
        for key in (
            "dataset_id",
            "validation_dataset_id",
            "task",
            "preset",
            "strategy",
            "run",
            "preference",
            "split",
            "graders",
            "name",
            "priority",
            "resources",
        )
        if key in body
    }
    arguments = [f"    {key}={body[key]!r}," for key in ("model", "training_file") if key in body]
    if "training_file" not in body:
        arguments.append('    training_file="",  # the data is named by dataset_id')
    return {
        "YAML": "# luthier train job.yaml\n" + yaml.safe_dump(dict(body), sort_keys=False, allow_unicode=True),
        "curl": as_curl(f"{base_url}/v1/fine_tuning/jobs", body),
        "Python": "\n".join(
            [
                "import os",
                "",
                "from openai import OpenAI",
                "",
                f'client = OpenAI(base_url="{base_url}/v1", api_key=os.environ["LUTHIER_API_KEY"])',
                "job = client.fine_tuning.jobs.create(",
                *arguments,
                textwrap.indent(f"extra_body={pprint.pformat(ours, sort_dicts=False, width=88)},", "    ").replace(
                    "\n    ", "\n" + " " * 15
                ),
                ")",
                "print(job.id, job.status)",
            ]
        ),
    }
