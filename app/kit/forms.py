"""Generates a form from a pydantic class, and parses a filled form into the class's settings.

Strategies and run settings describe themselves where they are declared: a field's description is the help under it, its bounds
are the input's. `json_schema_extra={"basic": True}` shows it without expanding anything, `{"rows": 4}` makes it a text area,
`{"unit": "tokens"}` names its unit, and `{"words": {"rouge_l": "ROUGE-L"}}` labels its choices. So a new strategy has its form
without a line here.
"""

from __future__ import annotations

import json
import re
import types
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Literal, NamedTuple, Union, cast, get_args, get_origin

import annotated_types
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from app.errors import plain
from app.languages import gettext

Widget = Literal["number", "select", "checkbox", "text", "area"]


@dataclass(frozen=True, slots=True)
class FormField:
    """One field of a form. Every value is the text of the input, as a browser sends it."""

    name: str
    key: str  # name of the input: `strategy.rank`
    label: str
    help: str
    widget: Widget
    basic: bool
    value: str
    default: str
    placeholder: str = ""
    unit: str | None = None
    minimum: str | None = None
    maximum: str | None = None
    step: str | None = None
    choices: tuple[str, ...] = ()
    words: Mapping[str, str] = field(default_factory=dict)  # choice → its label
    group: str = "Method"
    error: str | None = None

    @property
    def id(self) -> str:
        return self.key.replace(".", "-").replace("_", "-")

    @property
    def changed(self) -> bool:
        return self.value != self.default


class FormError(NamedTuple):
    """An error of a form, and the id of the element where it can be fixed."""

    text: str
    place: str | None


@dataclass(frozen=True, slots=True)
class Filled:
    """A parsed form: the settings that were given, or an error for each wrong field."""

    typed: dict[str, str]
    settings: dict[str, Any]  # only the fields that differ from their default, as JSON values
    errors: dict[str, str]  # field → sentence; "" for errors that belong to no field


def controls(
    cls: type[BaseModel],
    prefix: str,
    *,
    typed: Mapping[str, str] | None = None,
    errors: Mapping[str, str] | None = None,
    placeholders: Mapping[str, str] | None = None,
) -> list[FormField]:
    """The fields of a class in the order of their declaration, each with its current input and error. `placeholders` are values
    that the data decides where a field is left empty, whatever the class's own default is."""
    typed, errors, placeholders = typed or {}, errors or {}, placeholders or {}
    found = []
    for name, info in cls.model_fields.items():
        if name == "name":
            continue
        about, unit = info.description or "", _extra(info, "unit") or ""
        default = "" if name in placeholders else as_text(info.get_default(call_default_factory=True))
        found.append(
            FormField(
                name=name,
                key=f"{prefix}.{name}",
                label=label_of(name, info),
                help=gettext(about),
                value=typed.get(name, default),
                default=default,
                placeholder=placeholders.get(name, default),
                error=errors.get(name),
                basic=bool(_extra(info, "basic")),
                unit=gettext(unit) or None,
                words={choice: gettext(words) for choice, words in (_extra(info, "words") or {}).items()},
                group=_extra(info, "group") or "Method",
                **_widget(info),
            )
        )
    return found


def fill(cls: type[BaseModel], data: Mapping[str, str], prefix: str, keep: Container[str] = ()) -> Filled:
    """Parse the inputs `prefix.*` of a form. An empty input means the field's default; for fields in `keep` empty means something
    else, so a value is kept there even if it equals the default.

    Never raises for a person's input: errors are returned with the fields they belong to, and the input is kept.
    """
    typed = {key.removeprefix(prefix + "."): value.strip() for key, value in data.items() if key.startswith(prefix + ".")}
    # A form sends every field. One at its default was not chosen, so that another may take its place.
    defaults = {name: as_text(info.get_default(call_default_factory=True)) for name, info in cls.model_fields.items()}
    given = {name: value for name, value in typed.items() if value != "" and (name in keep or value != defaults.get(name))}
    try:
        settings = cls.model_validate(given)
    except ValidationError as error:
        return Filled(typed, {}, {str(e["loc"][0]) if e["loc"] else "": explain(cls, dict(e)) for e in error.errors()})
    changed = {
        name for name in given if name in keep or getattr(settings, name) != cls.model_fields[name].get_default(call_default_factory=True)
    }
    return Filled(typed, settings.model_dump(mode="json", include=changed), {})


def explain(cls: type[BaseModel], error: Mapping[str, Any]) -> str:
    """One of pydantic's errors as a sentence that says what is wrong and what to write instead."""
    name = str(error["loc"][0]) if error["loc"] else ""
    info = cls.model_fields.get(name)
    if info is None:
        known = ", ".join(n for n in cls.model_fields if n != "name")
        return gettext("There is no setting %(name)s. There is: %(known)s.", name=repr(name), known=known)
    limits = error.get("ctx", {})
    given = {"label": label_of(name, info), "text": as_text(error.get("input"))[:40]}
    if as_text(error.get("input")).strip().lower() in ("nan", "-nan", "+nan"):
        return gettext("%(label)s takes a number; you wrote %(text)s.", **given)
    match error["type"]:
        case "greater_than_equal":
            return gettext("%(label)s must be %(limit)s or more; you wrote %(text)s.", limit=as_text(limits["ge"]), **given)
        case "greater_than":
            return gettext("%(label)s must be more than %(limit)s; you wrote %(text)s.", limit=as_text(limits["gt"]), **given)
        case "less_than_equal":
            return gettext("%(label)s must be %(limit)s or less; you wrote %(text)s.", limit=as_text(limits["le"]), **given)
        case "less_than":
            return gettext("%(label)s must be less than %(limit)s; you wrote %(text)s.", limit=as_text(limits["lt"]), **given)
        case "int_parsing" | "int_from_float" | "int_type" | "int_parsing_size":
            return gettext("%(label)s takes a whole number; you wrote %(text)s.", **given)
        case "float_parsing" | "float_type" | "finite_number":
            return gettext("%(label)s takes a number; you wrote %(text)s.", **given)
        case "literal_error":
            return gettext("%(label)s is one of %(choices)s; you wrote %(text)s.", choices=", ".join(_choices(info)), **given)
        case "bool_parsing" | "bool_type":
            return gettext("%(label)s is true or false; you wrote %(text)s.", **given)
        case "value_error":
            return f"{given['label']}: {plain(error['msg'])}"
        case _:
            return gettext("%(label)s: %(fault)s; you wrote %(text)s.", fault=error["msg"], **given)


def whole_number(text: str) -> int | None:
    """The integer in an input, of at most 15 digits; None for anything else."""
    return int(text) if re.fullmatch("[0-9]{1,15}", text) else None


def as_text(value: Any) -> str:
    """A setting's value as a browser would send it, a list as lines, an object as JSON; empty for None."""
    if value is None:
        return ""
    if isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, list | tuple):
        return "\n".join(map(str, value))
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        text = f"{value:.10g}"
        return f"{Decimal(text):f}" if 1e-6 <= abs(value) < 1 else text  # 0.00005, which Python prints as 5e-05
    return str(value)


def label_of(name: str, info: FieldInfo) -> str:
    """The label of a setting in the language of the page: its title, or else its name in words."""
    return gettext(info.title or name.replace("_", " ").capitalize())


def _extra(info: FieldInfo, key: str) -> Any:
    return info.json_schema_extra.get(key) if isinstance(info.json_schema_extra, dict) else None


def _kind(info: FieldInfo) -> Any:
    """The annotation without `| None`."""
    if get_origin(info.annotation) in (Union, types.UnionType):
        return next(a for a in get_args(info.annotation) if a is not types.NoneType)
    return info.annotation


def _choices(info: FieldInfo) -> tuple[str, ...]:
    kind = _kind(info)
    return tuple(as_text(c) for c in get_args(kind)) if get_origin(kind) is Literal else ()


def _widget(info: FieldInfo) -> dict[str, Any]:
    """The input for a field's type: its kind, and the bounds that a browser can enforce."""
    kind = _kind(info)
    if kind is bool:
        return {"widget": "checkbox"}
    if choices := _choices(info):
        return {"widget": "select", "choices": choices if info.is_required() or info.default is not None else ("", *choices)}
    if kind not in (int, float):
        return {"widget": "area" if _extra(info, "rows") else "text"}
    bounds: dict[str, Any] = {"widget": "number", "step": "1" if kind is int else "any"}
    for rule in info.metadata:
        # HTML has no exclusive bounds. For integers the next one is used; for others the server decides.
        beside = 1 if kind is int else 0
        match rule:
            case annotated_types.Ge(ge=bound):
                bounds["minimum"] = as_text(bound)
            case annotated_types.Gt(gt=bound):
                bounds["minimum"] = as_text(cast("float", bound) + beside)
            case annotated_types.Le(le=bound):
                bounds["maximum"] = as_text(bound)
            case annotated_types.Lt(lt=bound):
                bounds["maximum"] = as_text(cast("float", bound) - beside)
    return bounds
