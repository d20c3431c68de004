"""What a request for reinforcement says, in OpenAI's words and in ours: the reward, and what a step draws."""

from __future__ import annotations

from typing import Any, TypeVar

from sqlalchemy.orm import Session

from app import saved_graders
from app.errors import BadField, StudioError
from app.graders import Grader
from app.jobs.request import Hyperparameters, JobRequest, ReinforcementHyperparameters
from app.languages import gettext, mark
from app.models import asked_models
from app.objectives.reinforcement import ReinforcementSettings
from app.tables import JSON, User

Number = TypeVar("Number", int, float)
USUAL_REWARDS: dict[str, JSON] = {
    "number": {"type": "numeric", "name": mark("Right number"), "reference": "{{item.reference}}"},
    "text": {
        "type": "string_check", "name": mark("Right text"), "input": "{{sample.output_text}}", "operation": "eq", "reference": "{{item.reference}}",
    },
    "similar": {
        "type": "text_similarity", "name": mark("Similar text"), "input": "{{sample.output_text}}", "reference": "{{item.reference}}",
        "evaluation_metric": "rouge_l",
    },
}  # fmt: skip
"""Rewards of the form for rows with a reference answer."""


def reward_of(session: Session, user: User, order: JobRequest) -> Grader:
    """The grader of a request: `method.reinforcement.grader`, or `preference.grader`; an id of a saved one, or a grader. Raises BadField and
    NotFound."""
    named = order.method.named() if order.method else None
    given, param = (order.preference or {}).get("grader"), "preference.grader"
    if not given and order.method:
        given, param = getattr(named, "grader", None), "method.reinforcement.grader"
    if not given:
        raise BadField(
            gettext("Reinforcement learning needs a reward."),
            hint=gettext("Send method.reinforcement.grader: a grader as {“type”: …}, or the id of a saved one."),
            param=param,
            code="missing_required_parameter",
        )
    try:
        (found,) = saved_graders.named(session, user, [given])
        asked_models.resolve(session, user, [found])
    except StudioError as error:
        error.param = param + (".model" if error.param in ("model", "grader.model") else (error.param or "").removeprefix("graders.0"))
        raise
    return found


def asked_settings(order: JobRequest) -> dict[str, Any]:
    """OpenAI's hyperparameters as settings of reinforcement. Raises BadField."""
    asked, found = order.asked(), dict[str, Any]()
    if asked.batch_size != "auto":
        found["prompts_per_step"] = _within("batch_size", asked.batch_size, 1, 512)
    if isinstance(asked, ReinforcementHyperparameters) and asked.compute_multiplier != "auto":
        times = _within("compute_multiplier", asked.compute_multiplier, 0.25, 8)
        found["group_size"] = round(ReinforcementSettings.model_fields["group_size"].default * times)
    return found


def fill_run(settings: dict[str, Any], asked: Hyperparameters) -> None:
    """OpenAI's hyperparameters that are run settings, unless these are set. Raises BadField."""
    if isinstance(asked, ReinforcementHyperparameters):
        if asked.eval_interval != "auto":
            settings.setdefault("eval_steps", _within("eval_interval", asked.eval_interval, 1, 100_000))
            settings.setdefault("evaluations_per_epoch", 0)
        if asked.eval_samples != "auto":
            settings.setdefault("graded_rows", _within("eval_samples", asked.eval_samples, 5, 2000))


def _within(name: str, value: Number, low: float, high: float) -> Number:
    """The value of a hyperparameter. Raises BadField, which names it as the request does."""
    if not low <= value <= high:
        hint = gettext('Give a number from %(low)s to %(high)s, or "auto".', low=f"{low:g}", high=f"{high:g}")
        raise BadField(gettext("%(name)s cannot be %(value)s.", name=name, value=value), hint=hint, param=f"hyperparameters.{name}")
    return value
