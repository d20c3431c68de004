"""The registry of graders: the folder itself. A grader scores one answer of a model, 0 to 1; a file here is one type, and nothing else
needs an edit. Files that begin with an underscore hold what several types share.

    grader = graders.read({"type": "string_check", …})      fields checked
    grader.prove()                                          what takes longer, once, when it is saved
    graders.grade(grader, Sample("…"), {"reference": "…"})  one answer

A judge and an embedding model are asked through a function that the caller gives: this package knows no models.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from pydantic import ValidationError

from app.errors import BadField, StudioError, field_path, plain
from app.graders._base import Ask, EmbedAsk, ErrorKind, GradedSample, GradeError, Grader, JudgeAsk, Reply, RewardAsk, Steps
from app.graders._judge import Judge
from app.graders._pairwise import PairVerdict, SelfAgreement, pair_verdict, prefer, self_agreement
from app.graders._schema import OutOfSteps, SchemaCheck, fault_in
from app.graders._simulated import SimulatedTools
from app.graders._tool_calls import calls_in, without_calls
from app.kit.json_safe import too_deep
from app.kit.registry import classes_in
from app.languages import gettext

__all__ = [
    "GRADERS",
    "Ask",
    "EmbedAsk",
    "GradeError",
    "Graded",
    "GradedSample",
    "Grader",
    "Judge",
    "JudgeAsk",
    "PairVerdict",
    "Reply",
    "RewardAsk",
    "SelfAgreement",
    "SimulatedTools",
    "as_openai",
    "calls_in",
    "compare",
    "follows",
    "grade",
    "item_of",
    "no_models",
    "parse",
    "read",
    "schema_fault",
    "scored",
    "self_agreement",
    "to_json",
    "without_calls",
]  # fmt: skip

GRADERS: dict[str, type[Grader]] = {
    get_args(cls.model_fields["type"].annotation)[0]: cls for cls in sorted(classes_in(__name__, Grader), key=lambda cls: cls.place)
}
"""Every type of grader by its name, in the order lists show them."""
MAX_BYTES = 256 << 10


def parse(given: Any) -> Grader:
    """A grader from its JSON, its fields checked. Raises BadField."""
    if not isinstance(given, dict):
        hint = gettext("Send {“type”: …, “name”: …} and the fields of its type.")
        raise BadField(gettext("A grader is a JSON object."), hint=hint, param="grader")
    kind = given.get("type")
    if not isinstance(kind, str) or kind not in GRADERS:
        said = gettext("There is no type of grader %(type)s.", type=repr(str(kind)[:60]))
        raise BadField(said, hint=gettext("Use one of %(names)s.", names=", ".join(GRADERS)), param="grader.type")
    if too_deep(given) or len(json.dumps(given)) > MAX_BYTES:
        said = gettext("The grader has more than %(most)s KiB, or is nested too deeply.", most=MAX_BYTES >> 10)
        raise BadField(said, hint=gettext("Shorten it."), param="grader")
    try:
        return GRADERS[kind].model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = field_path(("grader", *first["loc"]))
        if first["type"] == "missing":
            said = gettext("%(field)s is missing.", field=where)
            hint = gettext("Send %(field)s.", field=where)
            raise BadField(said, hint=hint, param=where, code="missing_required_parameter") from None
        if first["type"] == "extra_forbidden":
            known = ", ".join(info.alias or name for name, info in GRADERS[kind].model_fields.items())
            said = gettext("A %(type)s grader has no field %(field)s.", type=kind, field=where)
            raise BadField(said, hint=gettext("It has %(fields)s.", fields=known), param=where) from None
        said = gettext("%(field)s does not fit: %(reason)s", field=where, reason=plain(first["msg"]))
        raise BadField(said, hint=gettext("Change it and send the grader again."), param=where) from None


def read(given: Any) -> Grader:
    """A grader that works here: its fields, its code, its expression and its schema are checked. Raises BadField."""
    found = parse(given)
    found.prove()
    return found


def read_child(given: Any) -> Grader:
    """A grader inside another; pydantic adds the path to what it raises."""
    if isinstance(given, dict) and given.get("type") == "multi":
        raise ValueError("a combination cannot hold another")
    try:
        return parse(given)
    except BadField as error:
        raise ValueError(f"{error.message.rstrip('.')}. {error.hint}") from None


def schema_fault(schema: Any, where: str = "schema") -> str:
    """Why a JSON schema cannot be checked here, as `schema.a is not supported`; empty where it can. `where` is what it is called."""
    if not isinstance(schema, dict) or too_deep(schema) or len(json.dumps(schema)) > MAX_BYTES:
        return gettext("%(field)s is no JSON schema", field=where)
    return fault_in(schema, where)


def follows(schema: Any, value: Any) -> bool:
    """Whether a value follows a schema that `schema_fault` has found nothing wrong with."""
    try:
        return SchemaCheck(schema).fits(value)
    except OutOfSteps:
        return False


def to_json(grader: Grader) -> dict[str, Any]:
    """The grader as it was given, for storing and for the API."""
    return grader.model_dump(mode="json", by_alias=True, exclude_unset=True)


def item_of(row: Mapping[str, Any], prompt: str, reference: str) -> dict[str, Any]:
    """The `item` that a row of a dataset is to a grader: its extra columns, its own fields, the text of its prompt, and its reference."""
    columns = row.get("metadata")
    return {**(columns if isinstance(columns, dict) else {}), **row, "prompt": prompt, "reference": reference}


# Grading --------------------------------------------------------------------------------------------------------------


@dataclass
class Graded:
    """One answer's grade. Without an `error` there is a `reward`, in the grader's own range, and a `score`, 0 to 1; the score is None
    where the reward is outside the range."""

    reward: float = 0.0
    score: float | None = None
    parts: dict[str, float] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    error: tuple[ErrorKind, str] | None = None

    @property
    def why(self) -> str:
        """Why there is no score; empty where there is one."""
        return self.error[1] if self.error else ""


def no_models(ask: Ask) -> Reply:
    """Where no model can be asked."""
    raise GradeError("model_grader_server_error", gettext("No model can be asked here."))


def grade(grader: Grader, sample: GradedSample, item: Mapping[str, Any], answer: Callable[[Ask], Reply] = no_models) -> Graded:
    """Grade one answer; `answer` asks a model. What goes wrong with this answer is in the result and is not raised."""
    return _through(functools.partial(grader.steps, sample, dict(item)), answer)


def compare(judge: Judge, item: Mapping[str, Any], first: str, second: str, answer: Callable[[Ask], Reply]) -> PairVerdict:
    """Which of two answers a judge finds better, asked in both orders."""
    straight = _through(functools.partial(prefer, judge, dict(item), first, second), answer)
    swapped = _through(functools.partial(prefer, judge, dict(item), second, first), answer)
    rewards = [None if one.error else one.reward for one in (straight, swapped)]
    return pair_verdict(rewards[0], rewards[1], straight.why or swapped.why)


def _through(begin: Callable[[], Steps], answer: Callable[[Ask], Reply]) -> Graded:
    began, found = time.monotonic(), Graded()
    try:
        steps = begin()
        ask = next(steps)
        while True:
            ask = steps.send(answer(ask))
    except StopIteration as end:
        result = end.value
        found = Graded(result.reward, None, result.parts, result.tokens)
    except GradeError as error:
        found.error = (error.kind, error.message)
    except StudioError as error:
        found.error = ("model_grader_server_error", str(error))
    found.seconds = time.monotonic() - began
    return found


def as_openai(grader: Grader, graded: Graded) -> dict[str, Any]:
    """The answer of OpenAI's API. An answer that could not be graded has the reward 0 and a flag that says why."""
    kind, message = graded.error or ("", "")
    errors: dict[str, Any] = {name: name == kind for name in get_args(ErrorKind)}
    errors["model_grader_server_error_details"] = message if kind.startswith("model_grader") else None
    errors["python_grader_runtime_error_details"] = message if kind == "python_grader_runtime_error" else None
    errors["python_grader_server_error_type"] = message if kind == "python_grader_server_error" else None
    errors["message"] = message or None  # ours: why, for every kind
    return {
        "reward": graded.reward,
        "sub_rewards": graded.parts if grader.children() else {},
        "metadata": {
            "name": grader.name,
            "type": grader.type,
            "errors": errors,
            "execution_time": graded.seconds,
            "scores": graded.parts or {grader.name: graded.reward},
            "token_usage": sum(graded.tokens.values()) if graded.tokens else None,
            "sampled_model_name": next(iter(graded.tokens), None),
        },
        "model_grader_token_usage_per_model": graded.tokens,
    }


def scored(grader: Grader, graded: Graded) -> Graded:
    """The same with its score, or with an error where the reward is outside the range of a score."""
    if graded.error is None:
        try:
            graded.score = grader.score(graded.reward)
        except GradeError as error:
            graded.error = (error.kind, error.message)
    return graded
