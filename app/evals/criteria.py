"""The criteria of an eval: graders, each with the reward from which an answer passes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from app import graders
from app.errors import BadField
from app.graders import Graded, Grader
from app.languages import gettext
from app.tables import JSON

PASSES = 0.5
"""Without a pass_threshold an answer passes from this score on, 0 to 1: the middle of the grader's range."""
MAX_CRITERIA = 20


class Criterion(NamedTuple):
    grader: Grader
    threshold: float | None

    def passes(self, graded: Graded) -> bool:
        """Whether a graded answer passes. A threshold is in the grader's own range."""
        if graded.error:
            return False
        return graded.reward >= self.threshold if self.threshold is not None else (graded.score or 0.0) >= PASSES


def read(given: Sequence[Any], *, prove: bool = True) -> list[Criterion]:
    """Criteria as they were sent. Raises BadField, naming the place; with `prove` also for one that does not work here."""
    if not 1 <= len(given) <= MAX_CRITERIA:
        said = gettext("An eval has 1 to %(most)s criteria; %(count)s were sent.", most=MAX_CRITERIA, count=len(given))
        raise BadField(said, param="testing_criteria")
    found = [_criterion(place, one, prove) for place, one in enumerate(given)]
    names = [one.grader.name for one in found]
    if twice := next((name for name in names if names.count(name) > 1), None):
        said = gettext("Two criteria are called %(name)s.", name=twice)
        raise BadField(said, hint=gettext("Give each a name of its own."), param="testing_criteria")
    return found


def _criterion(place: int, given: Any, prove: bool) -> Criterion:
    where = f"testing_criteria.{place}"
    body: JSON = dict(given) if isinstance(given, dict) else {}
    threshold = body.pop("pass_threshold", None)
    if threshold is not None and (isinstance(threshold, bool) or not isinstance(threshold, int | float)):
        where = f"{where}.pass_threshold"
        raise BadField(gettext("%(field)s is no number.", field=where), param=where)
    if body.get("type") == "text_similarity" and threshold is None:
        where = f"{where}.pass_threshold"
        raise BadField(
            gettext("%(field)s is missing.", field=where), hint=gettext("Say from which similarity on an answer passes, as 0.8."),
            param=where, code="missing_required_parameter",
        )  # fmt: skip
    try:
        return Criterion(graders.read(body) if prove else graders.parse(body), threshold)
    except BadField as error:
        error.param = f"{where}{(error.param or '').removeprefix('grader')}"
        raise
