"""The data of the page of a grader: its form, and a trial on the first rows of a dataset beside labels given by hand."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from app import graders
from app.errors import BadField, StudioError
from app.graders import GRADERS, Graded, GradedSample, Grader, PairVerdict, SelfAgreement
from app.kit import forms, stats
from app.languages import gettext, mark
from app.prompts import service as prompts
from app.tables import Dataset

JSON = dict[str, Any]
PREFIX = "grader"
TRIED = 5
PASSES = 0.5
"""The score from which a grader counts as agreeing with the label good."""
LABELS = {"": mark("no label"), "good": mark("good"), "bad": mark("bad")}


# The form -------------------------------------------------------------------------------------------------------------


def controls(cls: type[Grader], typed: Mapping[str, str], fault: StudioError | None = None) -> list[forms.FormField]:
    """The fields of a type. Texts and JSON are areas."""
    words = (fault.param or "").split(".") if fault else []
    at = words[1] if len(words) > 1 and words[0] == PREFIX else ""
    errors = {name: f"{fault.message} {fault.hint}" for name, info in cls.model_fields.items() if fault and at == (info.alias or name)}
    hidden = {"type"} if typed.get("image_tag") else {"type", "image_tag"}  # kept where a grader came with it
    found = [one for one in forms.controls(cls, PREFIX, typed=typed, errors=errors) if one.name not in hidden]
    return [_as_area(one, cls.model_fields[one.name]) for one in found]


def _as_area(control: forms.FormField, info: FieldInfo) -> forms.FormField:
    if control.widget != "text" or control.name == "model":
        return control
    about = f"{control.help} {gettext('As JSON.')}" if _is_json(info) else control.help
    label = gettext(info.alias.capitalize()) if info.alias else control.label
    return dataclasses.replace(control, widget="area", help=about, label=label)


def _is_json(info: FieldInfo) -> bool:
    """Whether a field holds more than a text, a number or a choice."""
    kinds = get_args(info.annotation) or (info.annotation,)
    return get_origin(info.annotation) in (dict, tuple, list) or any(
        isinstance(kind, type) and issubclass(kind, BaseModel) for kind in kinds
    )


def typed_of(kind: str, body: Mapping[str, Any]) -> dict[str, str]:
    """What the form shows of a grader."""
    found = {}
    for name, info in GRADERS[kind].model_fields.items():
        value = body.get(info.alias or name)
        if value is not None:
            found[name] = json.dumps(value, ensure_ascii=False, indent=2) if _is_json(info) else forms.as_text(value)
    return found


def body_of(kind: str, name: str, typed: Mapping[str, str]) -> JSON:
    """The grader of a filled form, not checked yet. Raises BadField for JSON that cannot be read."""
    found: JSON = {"type": kind, "name": name}
    if kind not in GRADERS:
        return found
    for field, info in GRADERS[kind].model_fields.items():
        text = typed.get(field, "")
        if field in ("type", "name") or (text.strip() == "" and not info.is_required()):
            continue
        key = info.alias or field
        if not _is_json(info):
            found[key] = text
            continue
        try:
            found[key] = json.loads(text)
        except (ValueError, RecursionError) as error:
            message = gettext("%(field)s is no JSON: %(error)s.", field=key, error=str(error)[:100])
            raise BadField(message, hint=gettext("Correct it."), param=f"{PREFIX}.{key}") from None
    return found


# The trial ------------------------------------------------------------------------------------------------------------


class TrialRow(NamedTuple):
    """One row: what is asked, the expected answer, the answer that is graded, the label given by hand, and the grade."""

    line: int
    prompt: str
    reference: str
    item: JSON
    answer: str
    label: str = ""
    graded: Graded | None = None


class Agreement(NamedTuple):
    """How many labels the grader agrees with, with Wilson's interval of the share."""

    agreed: int
    labeled: int
    low: float
    high: float


def rows_of(dataset: Dataset, typed: Mapping[str, str]) -> list[TrialRow]:
    """The first rows, with the answers and labels of a filled form; an answer that was not typed is the expected one."""
    found = []
    for item in ((dataset.report or {}).get("preview") or [])[:TRIED]:
        line, row = item["line"], item["row"]
        solved, _ = prompts.solved(line, row)
        if solved.question:
            answer = typed.get(f"answer.{line}", solved.answer)
            about = graders.item_of(row, solved.question, solved.answer)
            found.append(TrialRow(line, solved.question, solved.answer, about, answer, typed.get(f"label.{line}", "")))
    return found


def samples_of(rows: Sequence[TrialRow]) -> list[tuple[GradedSample, JSON]]:
    return [(GradedSample(row.answer), row.item) for row in rows]


def with_grades(grader: Grader, rows: Sequence[TrialRow], found: Sequence[Graded]) -> list[TrialRow]:
    return [row._replace(graded=graders.scored(grader, one)) for row, one in zip(rows, found, strict=True)]


def agreement(rows: Sequence[TrialRow]) -> Agreement | None:
    """None where no row has both a label and a score."""
    both = [(row.label == "good", row.graded.score >= PASSES) for row in rows if row.label and row.graded and row.graded.score is not None]
    if not both:
        return None
    agreed = sum(one == other for one, other in both)
    return Agreement(agreed, len(both), *stats.wilson(agreed, len(both)))


# Two answers ----------------------------------------------------------------------------------------------------------


class ComparedRow(NamedTuple):
    """One row with the answers of two models, and the verdict of the judge in words."""

    line: int
    prompt: str
    first: str
    second: str
    verdict: str
    why: str


class ComparedModels(NamedTuple):
    """Two models' answers before a judge: the rows, and how often it agrees with itself."""

    models: tuple[str, str]
    rows: list[ComparedRow]
    agreement: SelfAgreement | None


def compared(
    models: tuple[str, str], first: Sequence[TrialRow], second: Sequence[TrialRow], found: Sequence[PairVerdict]
) -> ComparedModels:
    rows = [
        ComparedRow(a.line, a.prompt, a.answer, b.answer, _verdict(one, models), one.why)
        for a, b, one in zip(first, second, found, strict=True)
    ]
    return ComparedModels(models, rows, graders.self_agreement(found))


def _verdict(one: PairVerdict, models: tuple[str, str]) -> str:
    """Empty where the judge gave no verdict in one of the two orders."""
    if one.straight is None or one.swapped is None:
        return ""
    if one.position is not None:
        return gettext("decided by position: answer %(answer)s in both orders", answer=one.position)
    if one.winner is None:
        return gettext("a tie in one order and not in the other")
    return {"first": models[0], "second": models[1], "tie": gettext("a tie")}[one.winner]


def comparison_json(found: Sequence[PairVerdict]) -> JSON:
    """A comparison as the API returns it."""
    told = graders.self_agreement(found)
    agreement = None
    if told is not None:
        agreement = {
            "rows": told.rows, "agreed": told.agreed, "share": told.agreed / told.rows, "interval": (told.low, told.high),
            "by_position": told.by_position, "first_place": told.first_place,
            "wins": dict(zip(("first", "second", "tie"), told.wins, strict=True)), "failed": told.failed,
        }  # fmt: skip
    rows = [
        {"straight": one.straight, "swapped": one.swapped, "winner": one.winner, "position": one.position, "error": one.why or None}
        for one in found
    ]
    return {"object": "grader.comparison", "rows": rows, "agreement": agreement}
