"""Cricket bat or hockey stick: by rules, by frozen features with a trained classifier, and by a prompt, on the same rows."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from sqlalchemy import select
from sqlalchemy.orm import Session

from app.datasets import samples
from app.kit import stats
from app.kit.humanize import human_percent, human_seconds
from app.languages import gettext, lowered, mark, ngettext
from app.learn import _visits
from app.learn._base import Need, StartedStop, Stop, StopBar, StopBars, StopResult, StopTable, Typed
from app.learn._jobs import fault_of, job_of, moving, order_job, path_of
from app.learn._scored import OPEN, ScoredPrompt, bar_of, runs_of, start
from app.prompts import runs as prompt_runs
from app.prompts.service import PromptBody
from app.tables import Job, PromptResult, PromptRun, StopVisit, User

BAT, STICK = "cricket bat", "hockey stick"
RULES: tuple[tuple[str, str], ...] = (
    (r"\b(curved|hook\w*|bent|thin|narrow|slim|crook)\b", STICK),
    (r"\b(wide|wider|broad|flat)\b", BAT),
    (r"\b(handle|blade)\b", BAT),
)
"""The first that fits decides; where none does, it is a stick."""
SPLIT = {"validation_fraction": 0.5, "seed": 42}
"""Half of the rows, so that the three are compared on more than a handful."""
ASKED = ScoredPrompt(
    mark("A prompt"),
    PromptBody(
        template="Is it a cricket bat or a hockey stick?\n\n{{input}}\n\nAnswer with one of: {{labels}}.", score="label", max_tokens=12
    ),
)


class BatOrStickStop(Stop):
    name: ClassVar = "bat-or-stick"
    title: ClassVar = mark("Bat or stick: three ways")
    place: ClassVar = 80
    idea: ClassVar = mark(
        "Is it a cricket bat or a hockey stick? Once one wrote rules: it is used for sport, has a handle, and is wide at the bottom. Then "
        "one trained a network on examples. Now one can also ask a language model."
    )
    do: ClassVar = mark(
        "Three rules, a classifier trained on the vectors of a frozen encoder, and a prompt are scored on the same descriptions."
    )
    words: ClassVar = ("Feature extraction", "Encoder", "Zero-shot", "Accuracy", "Validation set")
    needs: ClassVar[tuple[Need, ...]] = ("writes", "encoder")
    samples: ClassVar = ("bat-or-stick",)
    button: ClassVar = mark("Score all three")

    def begin(self, session: Session, user: User, typed: Typed, visit: StopVisit | None) -> StartedStop:
        writer, encoder = (_visits.take_model(session, user, need) for need in self.needs)
        dataset = samples.add(session, user, self.samples[0])
        job = order_job(session, user, self, encoder, dataset, {"name": "feature_extraction"}, dict(SPLIT))
        order = prompt_runs.RunOrder(rows=200, validation_fraction=SPLIT["validation_fraction"], split_seed=int(SPLIT["seed"]))
        run = start(session, user, self.title, ASKED, writer, dataset, order)
        return StartedStop({"job": str(job.id), "runs": {"prompt": str(run.id)}})

    def look(self, session: Session, user: User, visit: StopVisit) -> StopResult:
        job, run = job_of(session, user, visit.refs["job"]), runs_of(session, user, visit.refs["runs"]).get("prompt")
        if job is None or run is None:
            return StopResult(fault=gettext("What it started was deleted."))
        waits = moving(job) or run.status in OPEN
        fault = fault_of(job) or ((run.error or {}).get("message", "") if run.status == "failed" else "")
        result = StopResult(
            doing=gettext("The three are scored") if waits else "", progress=(run.progress or 0.0) / 2 if waits else None, fault=fault
        )
        if waits or fault:
            return result
        rows = session.scalars(select(PromptResult).where(PromptResult.run_id == run.id)).all()
        bars = [_by_rules(rows), _by_features(job, len(rows)), bar_of(gettext(ASKED.title), run)]
        best = max(bar.share for bar in bars)
        result.ended = True
        title = ngettext("Right of %(num)s description", "Right of %(num)s descriptions", len(rows))
        result.bars = [StopBars(title, [bar._replace(best=bar.share == best) for bar in bars])]
        result.headline = ", ".join(f"{lowered(bar.label)} {human_percent(bar.share, 0)}" for bar in bars)
        result.tables = [_ways(job, run, len(rows)), _mistakes(rows)]
        result.links = [(gettext("The classifier's run"), path_of(job)), (gettext("The prompt's answers"), bars[2].path)]
        return result


def by_rules(text: str) -> str:
    """What the rules say of a description."""
    return next((label for pattern, label in RULES if re.search(pattern, text, re.IGNORECASE)), STICK)


def _by_rules(rows: Sequence[PromptResult]) -> StopBar:
    scores = [float(by_rules(row.input) == row.expected) for row in rows]
    low, high = stats.interval(scores)
    return StopBar(gettext("Rules"), sum(scores) / max(len(scores), 1), _share(scores), low, high)


def _by_features(job: Job, rows: int) -> StopBar:
    told: Mapping[str, Any] = (job.evaluation or {}).get("tuned") or {}
    accuracy = float(told.get("accuracy") or 0.0)
    low, high = stats.wilson(accuracy * rows, rows)
    return StopBar(gettext("Frozen features"), accuracy, _of_rows(accuracy, rows), low, high, path_of(job))


def _share(scores: Sequence[float]) -> str:
    return _of_rows(sum(scores) / max(len(scores), 1), len(scores))


def _of_rows(share: float, rows: int) -> str:
    return ngettext("%(share)s of %(num)s row", "%(share)s of %(num)s rows", rows, share=human_percent(share, 0))


def _ways(job: Job, run: PromptRun, rows: int) -> StopTable:
    measured, labeled = job.measured or {}, job.spec["dataset"]["rows"] - rows
    return StopTable(
        gettext("What each way took"),
        (gettext("Way"), gettext("Written or trained"), gettext("Labeled rows"), gettext("Time")),
        (
            (
                gettext("Rules"),
                ngettext("%(num)s rule by a person", "%(num)s rules by a person", len(RULES)),
                "0",
                gettext("under a second"),
            ),
            (gettext("Frozen features"), gettext("a classifier on the vectors"), str(labeled), human_seconds(measured.get("seconds"))),
            (gettext("A prompt"), gettext("one sentence"), "0", human_seconds((run.result or {}).get("seconds"))),
        ),
        (2, 3),
    )


def _mistakes(rows: Sequence[PromptResult]) -> StopTable:
    """Descriptions that the rules or the prompt got wrong: most say nothing of a wide bottom."""
    wrong = [row for row in rows if by_rules(row.input) != row.expected or row.score < 1][:5]
    return StopTable(
        gettext("Descriptions that were hard"),
        (gettext("Description"), gettext("Is"), gettext("Rules"), gettext("Prompt")),
        [(r.input, r.expected, by_rules(r.input), r.answer[:40]) for r in wrong],
    )
