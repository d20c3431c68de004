"""The registry of trackers, programs that show the curves of runs: the folder itself. A file here that defines a `Tracker` may be named in
a job's `integrations` and in LUTHIER_TRACKERS; nothing else needs an edit. Files that begin with an underscore hold what several share.

What is sent, when, and how often it is tried is `app/tracking/`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from app.errors import BadField, field_path, plain
from app.kit.registry import classes_in
from app.languages import gettext
from app.trackers._base import MEASURED, Point, SentState, TrackedJob, Tracker, Value, figures

__all__ = ["MEASURED", "TRACKERS", "Point", "SentState", "TrackedJob", "Tracker", "Value", "figures", "named", "read"]

TRACKERS: dict[str, type[Tracker]] = {cls.kind: cls for cls in classes_in(__name__, Tracker)}
"""Every tracker by its kind."""


def read(integrations: Sequence[dict[str, Any]]) -> list[Tracker]:
    """The trackers in a request: `{"type": "mlflow", "mlflow": {…}}`, where null means absent. Raises BadField for one that is unknown,
    malformed, there twice, or that this studio cannot send to."""
    found: dict[str, Tracker] = {}
    for place, given in enumerate(integrations):
        kind = given.get("type")
        if not isinstance(kind, str) or kind not in TRACKERS:
            message = gettext("There is no integration %(name)s.", name=repr(str(kind)[:60]))
            raise BadField(message, hint=gettext("Use one of %(names)s.", names=", ".join(TRACKERS)), param="integrations")
        if kind in found:
            message = gettext("The integration %(name)s is there twice.", name=kind)
            raise BadField(message, hint=gettext("Name each once."), param="integrations")
        if extra := sorted(set(given) - {"type", kind}):
            message = gettext("An integration has no field %(field)s.", field=repr(extra[0][:60]))
            raise BadField(message, hint=gettext("It has type and %(name)s.", name=kind), param="integrations")
        found[kind] = _read(kind, given.get(kind), place)
        found[kind].check()
    return list(found.values())


def _read(kind: str, given: Any, place: int) -> Tracker:
    if not isinstance(given, dict | None):
        message = gettext("%(name)s is no JSON object.", name=kind)
        raise BadField(message, hint=gettext("Send the fields of the tracker."), param=f"integrations.{place}.{kind}")
    try:
        return TRACKERS[kind].model_validate({name: value for name, value in (given or {}).items() if value is not None})
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(filter(None, (f"integrations.{place}.{kind}", field_path(first["loc"], ""))))
        message = gettext("%(field)s cannot be %(value)s.", field=where, value=repr(first["input"])[:60])
        raise BadField(message, hint=plain(first["msg"]), param=where) from None


def named(text: str) -> list[Tracker]:
    """The trackers in LUTHIER_TRACKERS, each with its usual fields. Raises BadField for an unknown one."""
    kinds = text.replace(",", " ").split()
    for kind in kinds:
        if kind not in TRACKERS:
            message = gettext("LUTHIER_TRACKERS names %(name)s.", name=repr(kind[:60]))
            raise BadField(message, hint=gettext("There are %(names)s.", names=", ".join(TRACKERS)), param="trackers")
    return [TRACKERS[kind]() for kind in dict.fromkeys(kinds)]
