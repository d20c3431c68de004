"""What a request for reinforcement says, in OpenAI's words and in ours: the reward, and what a step draws."""

from __future__ import annotations

from typing import Any

from sqlalchemy.orm import Session

from app import graders, saved_graders
from app.errors import BadField, StudioError
from app.jobs.request import Hyperparameters, JobRequest, ReinforcementHyperparameters
from app.objectives.reinforcement import ReinforcementSettings
from app.tables import JSON, User

USUAL_REWARDS: dict[str, JSON] = {
    "number": {"type": "numeric", "name": "Right number", "reference": "{{item.reference}}"},
    "text": {
        "type": "string_check", "name": "Right text", "input": "{{sample.output_text}}", "operation": "eq", "reference": "{{item.reference}}",
    },
    "similar": {
        "type": "text_similarity", "name": "Similar text", "input": "{{sample.output_text}}", "reference": "{{item.reference}}",
        "evaluation_metric": "rouge_l",
    },
}  # fmt: skip
"""Rewards of the form for rows with a reference answer."""


def reward_of(session: Session, user: User, order: JobRequest) -> JSON:
    """The grader of a request: `method.reinforcement.grader`, or `preference.grader`; an id of a saved one, or a grader. Raises BadField and
    NotFound."""
    named = order.method.named() if order.method else None
    given, param = (order.preference or {}).get("grader"), "preference.grader"
    if not given and order.method:
        given, param = getattr(named, "grader", None), "method.reinforcement.grader"
    if not given:
        raise BadField(
            "Reinforcement needs a reward.",
            hint="Send method.reinforcement.grader: a grader as {“type”: …}, or the id of a saved one.",
            param=param,
            code="missing_required_parameter",
        )
    try:
        (found,) = saved_graders.named(session, user, [given])
    except StudioError as error:
        error.param = param + (error.param or "").removeprefix("graders.0")
        raise
    if any(True for _ in found.models()):
        raise BadField(
            f"The grader {found.name} asks a model, which a trainer cannot do.",
            hint="Take a grader without a model as the reward.",
            param=param,
        )
    return graders.to_json(found)


def asked_settings(order: JobRequest) -> dict[str, Any]:
    """OpenAI's hyperparameters as settings of reinforcement. Raises BadField."""
    asked, found = order.asked(), dict[str, Any]()
    if asked.batch_size != "auto":
        found["prompts_per_step"] = asked.batch_size
    if isinstance(asked, ReinforcementHyperparameters) and asked.compute_multiplier != "auto":
        if not 0.25 <= asked.compute_multiplier <= 8:
            raise BadField(
                f"compute_multiplier cannot be {asked.compute_multiplier}.",
                hint='Give a number from 0.25 to 8, or "auto".',
                param="hyperparameters.compute_multiplier",
            )
        found["group_size"] = round(ReinforcementSettings.model_fields["group_size"].default * asked.compute_multiplier)
    return found


def fill_run(settings: dict[str, Any], asked: Hyperparameters) -> None:
    """OpenAI's hyperparameters that are run settings, unless these are set."""
    if isinstance(asked, ReinforcementHyperparameters):
        if asked.eval_interval != "auto":
            settings.setdefault("eval_steps", asked.eval_interval)
            settings.setdefault("evaluations_per_epoch", 0)
        if asked.eval_samples != "auto":
            settings.setdefault("graded_rows", asked.eval_samples)
