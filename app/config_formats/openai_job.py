"""A fine-tuning job of OpenAI's API as JSON: the body of `POST /v1/fine_tuning/jobs`, or the job that it answers with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from app.config_formats._base import ConfigFormat, Note, Translation, left, nothing, read_elsewhere, to
from app.errors import BadData
from app.objectives import METHODS


def recognizes(body: Mapping[str, Any]) -> bool:
    return (
        "training_file" in body
        and "model" in body
        and bool({"method", "hyperparameters", "object", "suffix"} & body.keys())
        and "run" not in body
    )


def finish(found: Translation) -> None:
    method = found.body.get("method") or {}
    kind = method.get("type", "supervised")
    if kind not in METHODS:
        raise BadData(f"The method {kind!r} of OpenAI is not trained here.", hint=f"Known are {', '.join(METHODS)}.")
    given = (method.get(kind) or {}).get("hyperparameters") or found.body.get("hyperparameters") or {}
    known = {name: value for name, value in given.items() if value not in (None, "auto")}
    grader = {"grader": method[kind]["grader"]} if kind == "reinforcement" and (method.get(kind) or {}).get("grader") else {}
    if known or kind != "supervised":
        found.put("method", {"type": kind, kind: {**grader, "hyperparameters": known}})
    found.notes.append(Note("model", found.body["model"], "write the name of a model of this studio: weights of OpenAI's cannot be had"))
    for name in ("training_file", "validation_file"):
        if str(found.get(name) or "").startswith("file-"):
            found.note(name, "a file of OpenAI's: download it there, and write the path of the file on this machine")


FORMAT = ConfigFormat(
    name="openai_job",
    title="OpenAI's fine-tuning API",
    recognizes=recognizes,
    finish=finish,
    rules={
        "model": to("model", str), "training_file": to("training_file", str), "validation_file": to("validation_file", str), "suffix": to("suffix", str),
        "seed": to("seed", int), "method": read_elsewhere, "hyperparameters": read_elsewhere, "metadata": to("metadata"), "id": nothing, "object": nothing,
        "user_provided_suffix": to("suffix", str), "created_at": nothing, "finished_at": nothing, "status": nothing, "organization_id": nothing,
        "result_files": nothing, "trained_tokens": nothing, "fine_tuned_model": nothing, "estimated_finish": nothing, "error": nothing,
        "usage_metrics": nothing, "shared_with_openai": nothing, "eval_id": left("an evaluation is started on the model's page"),
        "integrations": left("metrics are kept in the studio"),
    },
)  # fmt: skip
