"""Prompts that a stop scores on the same rows with one model, by runs of the prompt lab."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple

from sqlalchemy.orm import Session

from app.datasets import samples
from app.kit import ids, stats
from app.kit.humanize import human_percent, human_seconds
from app.languages import gettext, localized, lowered, ngettext
from app.learn import _visits
from app.learn._base import Need, StartedStop, Stop, StopBar, StopBars, StopResult, StopText, Typed
from app.ownership import mine
from app.prompts import prompt_vs_tuning
from app.prompts import runs as prompt_runs
from app.prompts import service as prompts
from app.prompts.service import PromptBody
from app.tables import Dataset, Model, Prompt, PromptRun, PromptVersion, StopVisit, User

OPEN = ("queued", "running")


class ScoredPrompt(NamedTuple):
    """One prompt of a stop: what it is called there (marked, since its name is stored), its body, and whether it is sent without a chat template."""

    title: str
    body: PromptBody
    raw: bool = False


def start(
    session: Session, user: User, stop: str, prompt: ScoredPrompt, model: Model, dataset: Dataset, order: prompt_runs.RunOrder
) -> PromptRun:
    """A run of a prompt, saved under the stop's name; a prompt that is there already is not made twice."""
    version = _version(session, user, f"{stop}: {prompt.title.lower()}", prompt.body)
    return prompt_runs.create(session, user, version, model.name, dataset, order.model_copy(update={"raw": prompt.raw}))


def _version(session: Session, user: User, name: str, body: PromptBody) -> PromptVersion:
    found = session.scalar(mine(Prompt, user).where(Prompt.name == name, Prompt.owner_id == user.id).limit(1))
    return prompts.revise(session, user, found, body) if found else prompts.create(session, user, name, body)[1]


def runs_of(session: Session, user: User, keys: Mapping[str, str]) -> dict[str, PromptRun]:
    """The runs of a visit by their keys, without those that were deleted."""
    wanted = {uuid.UUID(key): name for name, key in keys.items()}
    found = session.scalars(mine(PromptRun, user).where(PromptRun.id.in_(wanted))).all()
    return {name: run for name in keys for run in found if wanted[run.id] == name}


def path_of(run: PromptRun) -> str:
    return f"/playground/prompts/runs/{ids.public(ids.RUN, run.id)}"


def bar_of(title: str, run: PromptRun, best: bool = False) -> StopBar:
    """A run's score with its interval."""
    told = run.result or {}
    value = gettext(run.status)
    if rows := told.get("rows", 0):
        value = ngettext(
            "%(share)s of %(num)s row in %(time)s", "%(share)s of %(num)s rows in %(time)s", rows,
            share=human_percent(told.get("score"), 0), time=human_seconds(told.get("seconds")),
        )  # fmt: skip
    return StopBar(title, told.get("score") or 0.0, value, told.get("low"), told.get("high"), path_of(run), best)


def compared(session: Session, one: tuple[str, PromptRun], other: tuple[str, PromptRun]) -> str:
    """Two runs on the rows that both answered, in a sentence that calls no difference real which may be chance."""
    found = prompt_vs_tuning.paired(session, one[1], other[1])
    values = {
        "one": one[0], "other": lowered(other[0]), "worse": found.prompt_better, "rows": found.lines, "p": localized(f"{max(found.p, 1e-4):.2g}"),
    }  # fmt: skip
    if found.p < stats.SURE:
        return ngettext(
            "%(one)s against %(other)s: %(num)s row better, %(worse)s worse, of %(rows)s (exact paired test, p = %(p)s): a significant difference.",
            "%(one)s against %(other)s: %(num)s rows better, %(worse)s worse, of %(rows)s (exact paired test, p = %(p)s): a significant difference.",
            found.tuned_better, **values,
        )  # fmt: skip
    return ngettext(
        "%(one)s against %(other)s: %(num)s row better, %(worse)s worse, of %(rows)s (exact paired test, p = %(p)s): it may be chance, and more "
        "rows would tell.",
        "%(one)s against %(other)s: %(num)s rows better, %(worse)s worse, of %(rows)s (exact paired test, p = %(p)s): it may be chance, and more "
        "rows would tell.",
        found.tuned_better, **values,
    )  # fmt: skip


class ScoredPromptsStop(Stop):
    """A stop that scores several prompts on validation rows of one sample. The last prompt is compared with the first."""

    needs: ClassVar[tuple[Need, ...]] = ("writes",)
    prompts: ClassVar[Mapping[str, ScoredPrompt]]
    rows: ClassVar[int] = 24

    def begin(self, session: Session, user: User, typed: Typed, visit: StopVisit | None) -> StartedStop:
        model = _visits.take_model(session, user, "writes")
        dataset = samples.add(session, user, self.samples[0])
        order = prompt_runs.RunOrder(rows=self.rows, validation_fraction=0.5)
        runs = {key: start(session, user, self.title, one, model, dataset, order) for key, one in self.prompts.items()}
        return StartedStop({"runs": {key: str(run.id) for key, run in runs.items()}, "model": model.name})

    def look(self, session: Session, user: User, visit: StopVisit) -> StopResult:
        return scored_result(session, user, visit, self.prompts)


def scored_result(session: Session, user: User, visit: StopVisit, wanted: Mapping[str, ScoredPrompt]) -> StopResult:
    """The runs of a visit as bars, with an answer of each and the difference between the last and the first."""
    kept = visit.refs["runs"]  # JSONB keeps no order
    runs = runs_of(session, user, {key: kept[key] for key in wanted if key in kept})
    titles = {key: gettext(wanted[key].title) for key in runs}
    done = {key: run for key, run in runs.items() if run.status == "succeeded" and (run.result or {}).get("rows")}
    scores = {key: float((run.result or {})["score"]) for key, run in done.items()}
    failed = next((run for run in runs.values() if run.status == "failed"), None)
    moving = [run for run in runs.values() if run.status in OPEN]
    best = max(scores.values(), default=0.0)
    result = StopResult(
        ended=bool(done) and not moving and not failed,
        fault=f"{failed.error['message']} {failed.error['hint']}"
        if failed and failed.error
        else ""
        if runs
        else gettext("Its runs were deleted."),
        doing=ngettext("%(done)s of %(num)s prompt scored", "%(done)s of %(num)s prompts scored", len(runs), done=len(runs) - len(moving))
        if moving
        else "",
        progress=sum(run.progress or 0.0 for run in runs.values()) / max(len(runs), 1),
        headline=", ".join(f"{lowered(titles[key])} {human_percent(score, 0)}" for key, score in scores.items()),
        bars=[StopBars(gettext("Right answers"), [bar_of(titles[key], run, scores[key] == best > 0) for key, run in done.items()])]
        if done
        else [],
        texts=[text for key, run in done.items() for text in _example(session, titles[key], run)],
        links=[(gettext("Prompt lab: every prompt and every run"), "/playground/prompts")],
    )
    if len(done) > 1 and not moving:
        (first, one), *_, (last, other) = done.items()
        result.notes.append(compared(session, (titles[last], other), (titles[first], one)))
    return result


def _example(session: Session, title: str, run: PromptRun) -> Sequence[StopText]:
    """The first row of a run, as it was asked and answered."""
    found = prompt_runs.results(session, run, limit=1)
    return [
        StopText(
            title,
            row.said[0].strip() if row.said else "",
            row.rendered_prompt,
            row.score == 1,
            path_of(run),
            gettext("Reference: %(answer)s", answer=row.expected),
        )
        for row in found
    ]
