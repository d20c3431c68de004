"""The choice of a reward in the form of a new job: usual graders, saved ones, and that of a cloned job."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from app.jobs.reinforcement_order import USUAL_REWARDS
from app.kit.forms import FormField
from app.languages import gettext

KEY = "preference.grader"
CHOSEN = (KEY, "preference.teacher")
"""Settings that have a choice of their own above the others."""


def choices(saved: Sequence[tuple[str, str]], typed: Mapping[str, str]) -> list[tuple[str, str]]:
    """Values and names. A grader that is written out, as in a cloned job, is one of them."""
    found = [*((name, gettext(str(one["name"]))) for name, one in USUAL_REWARDS.items()), *saved]
    given = typed.get(KEY, "")
    return found if not given or given in dict(found) else [*found, (given, gettext("that of the cloned run"))]


def asked(offered: Sequence[tuple[str, str]], typed: Mapping[str, str]) -> Any:
    """The chosen reward, as a request has it; by default the first."""
    given = typed.get(KEY) or offered[0][0]
    return USUAL_REWARDS.get(given) or from_json(given, given)


def left_out(typed: Mapping[str, str]) -> dict[str, str]:
    """The inputs without those that have a choice of their own."""
    return {name: value for name, value in typed.items() if name not in CHOSEN}


def without(controls: Sequence[FormField]) -> list[FormField]:
    return [control for control in controls if control.key not in CHOSEN]


def from_json(text: str, otherwise: Any) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return otherwise
