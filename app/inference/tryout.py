"""The first look at a fine-tuned model: the questions its job saved for it (`app/jobs/solved_examples.py`), next to its base with
and without the few-shot examples of the job's verdict."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from typing import NamedTuple
from urllib.parse import urlencode

from pydantic import ValidationError
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from app.errors import StudioError
from app.inference.protocol import Sampling
from app.jobs.solved_examples import SolvedExample
from app.models import interpolation
from app.models import service as models
from app.spec import SILENT
from app.storage import places
from app.tables import JSON, Job, Model, User

FEW_SHOT = "few-shot:"
"""Prefix of a fine-tuned model's name: its base with the few-shot examples of the verdict. Only the playground's columns accept it."""
_OWN = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


class FirstLook(NamedTuple):
    """What one job saved for the first look at its model."""

    job: Job
    base: Model
    system: str
    questions: list[JSON]  # line, system, prompt, reference
    examples: list[SolvedExample]


def look_at(session: Session, user: User, names: Sequence[str]) -> FirstLook | None:
    """What the first of these columns with a model fine-tuned here has saved; None where there is none, or it is gone."""
    for name in names:
        with contextlib.suppress(StudioError):
            if look := of_name(session, user, name):
                return look
    return None


def of_name(session: Session, user: User, name: str) -> FirstLook | None:
    """By the name of a column: a fine-tuned model, one in another form of it, or its few-shot base. Raises as `models.resolve` does."""
    plain = interpolation.split_name(name.removeprefix(FEW_SHOT))[0]
    job, base = models.origin(session, models.resolve(session, user, plain))
    left = (job.evaluation or {}).get("tryout") if job else None
    if job is None or base is None or not left:
        return None
    return FirstLook(job, base, left["system"], left["questions"], [SolvedExample(**example) for example in left["examples"]])


def with_few_shot(session: Session, among: Sequence[Model], limit: int = 20) -> list[Model]:
    """The newest of these fine-tuned models whose bases can be prompted few-shot."""
    examples = func.jsonb_array_length(Job.evaluation["tryout"]["examples"])
    query = (
        select(Model)
        .join(Job, Model.job_id == Job.id)
        .where(Model.id.in_([model.id for model in among]), Job.evaluation.has_key("tryout"), examples > 0)
    )
    return list(session.scalars(query.where(Model.kind.not_in(SILENT)).order_by(Model.created_at.desc()).limit(limit)))


def address(base: str, tuned: str, kind: str, few_shot: bool = False) -> str:
    """The page on which a model is tried: a result next to its base, zero-shot and few-shot; a classifier where texts are classified, a
    reward model where graders are tried."""
    if kind == "reward":
        return f"/graders/new?{urlencode({'type': 'reward_model', 'model': tuned})}"
    if kind == "classifier":
        return f"/playground/classify?{urlencode({'models': tuned})}"
    names = [base, FEW_SHOT + tuned if few_shot else "", tuned]
    return f"/playground?{urlencode([('models', name) for name in names if name])}"


def has_examples(job: Job | None) -> bool:
    return bool(job and ((job.evaluation or {}).get("tryout") or {}).get("examples"))


def own_sampling(session: Session, user: User, names: Sequence[str]) -> JSON:
    """The sampling settings of the models' own generation_config.json; empty where they differ, or there are none."""
    found = []
    for name in names:
        with contextlib.suppress(StudioError):
            found.append(_own_sampling(models.resolve(session, user, name.removeprefix(FEW_SHOT)).model, session))
    return found[0] if found and all(one == found[0] for one in found) else {}


def _own_sampling(model: Model, session: Session) -> JSON:
    try:
        text = (places.path(str(models.base_of(session, model).path), weights=False) / "generation_config.json").read_text()
        given = json.loads(text)
        own = {name: given[name] for name in _OWN if given.get(name) is not None} if given.get("do_sample") else {}
        Sampling(**own)
    except (OSError, ValueError, AttributeError, ValidationError):
        return {}
    return own
