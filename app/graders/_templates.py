"""Templates of graders: `{{item.answer}}`, `{{sample.output_json.total}}`, `{{item.turns[0].content}}`.

A template is data: names are looked up in JSON values and their text is put in, in one pass. Nothing is evaluated, and what was put in
is not read again. A name that is absent is an error, never an empty text.
"""

from __future__ import annotations

import json
import re
from typing import Annotated, Any

from pydantic import AfterValidator, StringConstraints

from app.graders._base import MAX_TEXT, SAMPLE_NAMES, GradedSample, GradeError
from app.kit.humanize import human_number
from app.languages import gettext

MAX_TEMPLATE = 20_000
_PLACE = re.compile(r"\{\{([^{}]*)\}\}")
_PATH = re.compile(r"\s*(item|sample)((?:\.[A-Za-z_][\w-]*|\[\d{1,6}\]|\['[^'\]]*'\]|\[\"[^\"\]]*\"\])*)\s*")
_STEP = re.compile(r"\.([A-Za-z_][\w-]*)|\[(\d+)\]|\['([^']*)'\]|\[\"([^\"]*)\"\]")


def _checked(template: str) -> str:
    for found in _PLACE.finditer(template):
        path = _PATH.fullmatch(found[1])
        if path is None:
            raise ValueError(f"{found[0][:60]} is no name; write {{{{item.NAME}}}} or {{{{sample.output_text}}}}")
        if path[1] == "sample" and (not (steps := steps_of(path[2])) or steps[0] not in SAMPLE_NAMES):
            raise ValueError(f"{found[0][:60]} does not exist; a sample has {', '.join(SAMPLE_NAMES)}")
    return template


Template = Annotated[str, StringConstraints(max_length=MAX_TEMPLATE), AfterValidator(_checked)]


def steps_of(path: str) -> list[str | int]:
    """Keys and indexes of a path: `.a[0]['b']`."""
    return [
        int(found[2]) if found[2] else next((g for g in (found[1], found[3], found[4]) if g is not None), "")
        for found in _STEP.finditer(path)
    ]


def fill(template: str, sample: GradedSample, item: dict[str, Any]) -> str:
    """The template with the values of its names. Raises GradeError for a name that is absent, and for a text too long."""
    parts: list[str] = []
    end = total = 0
    for found in _PLACE.finditer(template):
        parts += template[end : found.start()], text_of(_value(found[1], sample, item))
        end = found.end()
        total += len(parts[-1])
        if total > MAX_TEXT:
            said = gettext("The filled template is longer than %(most)s characters.", most=human_number(MAX_TEXT))
            raise GradeError("truncated_observation_error", said)
    return "".join([*parts, template[end:]])


def _value(name: str, sample: GradedSample, item: dict[str, Any]) -> Any:
    path = _PATH.fullmatch(name)
    if path is None:
        raise GradeError("invalid_variable_error", gettext("%(name)s is no name.", name=repr(name.strip()[:60])))
    steps = steps_of(path[2])
    value: Any = item
    if path[1] == "sample":
        value, steps = sample.value(str(steps[0])), steps[1:]
    for step in steps:
        if isinstance(value, dict) and str(step) in value:
            value = value[str(step)]
        elif isinstance(value, list) and isinstance(step, int) and step < len(value):
            value = value[step]
        else:
            known = ", ".join(map(str, list(value)[:8])) if isinstance(value, dict) else ""
            raise GradeError("invalid_variable_error", _absent(name.strip()[:60], known, of_item=path[1] == "item"))
    return value


def _absent(name: str, known: str, *, of_item: bool) -> str:
    if of_item and known:
        return gettext("The item has no %(name)s: it has %(known)s.", name=name, known=known)
    if of_item:
        return gettext("The item has no %(name)s.", name=name)
    if known:
        return gettext("The answer has no %(name)s: it has %(known)s.", name=name, known=known)
    return gettext("The answer has no %(name)s.", name=name)


def text_of(value: Any) -> str:
    """A value as a template shows it: a text as it is, everything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
