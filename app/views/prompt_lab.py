"""The data of the prompts page: the live preview of a prompt, a trial on three rows, and prompts × models as a matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from app import formats, objectives
from app.datasets import service as datasets
from app.errors import BadField
from app.languages import gettext
from app.prompts import runs as prompt_runs
from app.prompts import service as prompts
from app.prompts.service import PromptBody, Solved
from app.tables import Dataset, Prompt, PromptRun, PromptVersion, User

TRY_ROWS = 3
MAX_RUNS = 32
"""Maximum of one click: prompts × models."""
QUESTION = Solved(
    0, "A farmer has 5 pens with 6 cows in each, and sells 7 cows. How many cows are left?", "5 × 6 = 30, 30 - 7 = 23\n#### 23"
)
"""Shown in the preview while no dataset is chosen."""


# The preview ----------------------------------------------------------------------------------------------------------


class PromptPreview(NamedTuple):
    """The messages of one row as (role, text), its reference answer, and its line."""

    messages: list[tuple[str, str]]
    reference: str
    line: int | None
    examples: int


def preview(body: PromptBody, dataset: Dataset | None) -> PromptPreview:
    """The prompt for the dataset's first row. The rows after it serve as examples; a run selects its own from the training set."""
    rows = [prompts.solved(item["line"], item["row"]) for item in (dataset.report or {}).get("preview", [])] if dataset else []
    rows = [(row, before) for row, before in rows if row.question] or [(QUESTION, [])]
    (row, before), *rest = rows
    examples = [(other.question, other.answer) for other, _ in rest[: body.shots]]
    report = (dataset.report or {}) if dataset else {}
    text = prompts.text_of(body, row.question, examples, sorted(report.get("labels", {})))
    system = [("system", body.system)] if body.system else []
    messages = [*system, *((turn["role"], turn["content"]) for turn in before), ("user", text)]
    return PromptPreview(messages, prompts.take(row.answer, body.reference, body.marker), row.line or None, len(examples))


# A try ----------------------------------------------------------------------------------------------------------------


def try_out(session: Session, user: User, body: PromptBody, model: str, dataset: Dataset) -> PromptRun:
    """A run over three validation rows with an unsaved prompt: it is in no list, and deleted when the next one is made."""
    _forget_tries(session, user)
    prompt, version = prompts.create(session, user, "Try", body)
    prompts.delete(session, user, prompt)
    order = prompt_runs.RunOrder(rows=TRY_ROWS)
    return prompt_runs.create(session, user, version, model, dataset, order, trial=True)


def _forget_tries(session: Session, user: User) -> None:
    """Delete trials that have ended, with their rows and prompts."""
    ended = session.execute(
        select(PromptRun.id, PromptVersion.prompt_id)
        .join(PromptVersion, PromptVersion.id == PromptRun.version_id)
        .where(PromptRun.project_id == user.project_id, prompt_runs.is_trial(), PromptRun.status.not_in(("queued", "running")))
    ).all()
    session.execute(delete(PromptRun).where(PromptRun.id.in_([run for run, _ in ended])))
    session.execute(delete(Prompt).where(Prompt.id.in_([prompt for _, prompt in ended])))


# The matrix -----------------------------------------------------------------------------------------------------------


def run_matrix(
    session: Session, user: User, versions: Sequence[PromptVersion], models: Sequence[str], dataset: Dataset, order: dict[str, object]
) -> list[PromptRun]:
    """One run for each prompt and model, all on rows that none of the models was trained on. Raises BadField before any is made."""
    models = list(dict.fromkeys(models))
    if not versions:
        raise BadField(gettext("No prompt was chosen."), hint=gettext("Choose at least one."), param="prompts")
    if not models:
        raise BadField(gettext("No model was chosen."), hint=gettext("Choose at least one."), param="models")
    if len(versions) * len(models) > MAX_RUNS:
        raise BadField(
            gettext(
                "%(prompts)s prompts × %(models)s models are %(runs)s runs; at most %(most)s start at once.",
                prompts=len(versions),
                models=len(models),
                runs=len(versions) * len(models),
                most=MAX_RUNS,
            ),
            hint=gettext("Choose fewer prompts or models."),
            param="models",
        )
    ordered = prompt_runs.read_order({**order, "beside": models[:16]})
    return [prompt_runs.create(session, user, version, model, dataset, ordered) for version in versions for model in models]


class RunMatrix(NamedTuple):
    """Newest run of each prompt version on each model: `rows` are (prompt, version, a run or None for each model)."""

    models: list[str]
    rows: list[tuple[Prompt, PromptVersion, list[PromptRun | None]]]


def matrix(runs: Sequence[tuple[PromptRun, Prompt, PromptVersion]]) -> RunMatrix:
    """`runs` come best first, and so do the rows; models in the order of their best score."""
    models = list(dict.fromkeys(run.spec["model"]["name"] for run, _, _ in runs))
    newest: dict[tuple[object, str], PromptRun] = {}
    for run, _, version in sorted(runs, key=lambda row: row[0].created_at):
        newest[version.id, run.spec["model"]["name"]] = run
    lines = {version.id: (prompt, version) for _, prompt, version in runs}
    return RunMatrix(
        models, [(prompt, version, [newest.get((key, model)) for model in models]) for key, (prompt, version) in lines.items()]
    )


def usable(session: Session, user: User, *named: str | None) -> list[Dataset]:
    """Datasets on offer whose rows have an answer to compare with."""
    return [d for d in datasets.with_rows(session, user, *named) if formats.asks(d.format) and objectives.get(d.task).scored]
