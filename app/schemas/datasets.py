"""Datasets: their versions, reports, rows and splits."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from app.objectives import Task
from app.schemas.base import Problem, Schema

Severity = Literal["error", "warning", "note"]


class SuggestedReading(Schema):
    """A body for `POST /v1/datasets/{key}/reparse` that reads the file as its values suggest."""

    format: str
    mapping: dict[str, str] = Field(description="Field of the format to column of the file.")


class ReadingProblem(Problem):
    """Why a file could not be read: the file, and the first line at fault where one is.

    Where the columns match no format, `columns`, `preview`, `suggested` and `mappings` are there to choose a mapping from.
    """

    file: str | None = None
    rule: str | None = Field(None, description="The rule that the line breaks, as in a report's findings.")
    value: str | None = Field(None, description="The value found there.")
    repair: str | None = Field(None, description="How most of the file's lines can be repaired, where a fix for them is known.")
    columns: list[str] | None = Field(None, description="Columns of the file.")
    preview: list[dict[str, str]] | None = Field(None, description="The first rows as they are in the file, long values cut.")
    suggested: SuggestedReading | None = Field(None, description="Judged by the values. Nothing is read so until it is confirmed.")
    mappings: dict[str, dict[str, str]] | None = Field(None, description="The likeliest mapping for each format.")


class Dataset(Schema):
    """One version of a dataset. `origin` says how it was made, and of what."""

    id: str
    object: Literal["dataset"]
    created_at: int = Field(description="Seconds since 1970.")
    name: str
    tags: list[str]
    version: int
    status: Literal["reading", "ready", "error"]
    progress: float | None = Field(description="Of reading, 0 to 1.")
    error: ReadingProblem | None
    format: str | None = Field(description="Null while the file has not been recognized.")
    task: Task | None
    mapping: dict[str, str | None] = Field(description="Field of the format to column of the file.")
    rows: int | None
    good_rows: int | None
    tokens: int | None
    trained_tokens: int | None
    longest: int | None = Field(description="Tokens of the longest row.")
    file_id: str | None
    parent: str | None = Field(description="The version this one was made from.")
    origin: dict[str, Any]


class DatasetWithVersions(Dataset):
    """A dataset with the ids of all its versions."""

    versions: list[str]


class UnfixedFinding(Schema):
    """A finding that was to be fixed and has no automatic fix."""

    finding: int
    line: int | None
    rule: str
    message: str
    why: str


class FixedDataset(Dataset):
    """A version that was just made by fixing another."""

    fixed: int | None = Field(description="Rows that the fixes change or remove; null where a whole file is repaired.")
    unfixed: list[UnfixedFinding]


class Change(Schema):
    """A row that a version changed: as it was, and as it is; null where a version has no such row. Long rows are shortened."""

    line: int
    kind: Literal["removed", "relabeled", "edited", "added"]
    before: dict[str, Any] | None
    after: dict[str, Any] | None


class DatasetChanges(Schema):
    """What a version changed against the one it was made from. Ask again while `status` is waiting or running."""

    object: Literal["dataset.changes"]
    dataset: str
    parent: str | None = Field(description="Null where there is no version to compare with.")
    status: Literal["waiting", "running", "ready", "error"]
    error: Problem | None
    removed: int | None = None
    relabeled: int | None = None
    edited: int | None = None
    added: int | None = Field(None, description="Rows that are valid in this version only.")
    kept: int | None = None
    examples: list[Change] | None = Field(None, description="The first of each kind.")


class VoteDataset(Schema):
    """A dataset that was just made from votes."""

    id: str
    object: Literal["dataset"]
    name: str
    status: Literal["reading", "ready", "error"]


class FindingFix(Schema):
    """How a finding can be fixed by one click or call."""

    label: str
    operation: str = Field(description="`choose` is no automatic fix: rows contradict each other, and one of them is edited or removed.")
    arguments: dict[str, Any]


class Finding(Schema):
    """One thing about one row. An error leaves the row out; a warning or note keeps it."""

    id: int
    line: int | None
    column: str | None = Field(description="A path into the row, as messages[2].content.")
    rule: str
    severity: Severity
    value: str | None
    message: str
    fix: FindingFix | None


class RuleCount(Schema):
    """How often a rule was broken, with an example."""

    rule: str
    severity: Severity
    count: int
    message: str


class UnknownRole(Schema):
    """A name of a speaker that is no role. Its rows are excluded until `POST /v1/datasets/{key}/fixes` says what it stands for."""

    role: str
    messages: int
    suggested: Literal["user", "assistant", "system", "tool"] | None


class DatasetReport(Schema):
    """What was found in a version, one page of findings at a time."""

    object: Literal["dataset.report"]
    dataset: str
    status: Literal["reading", "ready", "error"]
    progress: float | None
    error: ReadingProblem | None
    format: str | None
    task: str | None
    mapping: dict[str, str | None]
    reason: str | None = Field(description="Why the file was taken for this format.")
    rows: int | None
    good_rows: int | None
    characters: int
    tokens: int | None
    trained_tokens: int | None
    longest: int | None
    rules: list[RuleCount]
    unknown_roles: list[UnknownRole]
    findings: list[Finding]
    has_more: bool


class FailedReading(Schema):
    """A newer reading of the same file, which failed, so that an older one is used."""

    dataset: str
    version: int
    error: ReadingProblem | None


class FileReport(DatasetReport):
    """The report of the newest good reading of a file."""

    failed_later: FailedReading | None


Inspected = Literal["waiting", "running", "ready", "error"]


class LineProblem(Schema):
    """A finding about a line as it is in the file."""

    rule: str
    message: str
    column: str | None
    value: str | None
    severity: Severity
    fix: FindingFix | None


class DatasetLine(Schema):
    """A line as it is in the file. Ask again while `status` is waiting or running."""

    object: Literal["dataset.line"]
    line: int
    status: Inspected
    error: Problem | None
    text: str | None = Field(description="Null where the file has no such line, or where it is too long to be shown.")
    problems: list[LineProblem]


class Tokens(Schema):
    """A sequence as a model reads it. A token is [text, state]: 0 masked, 1 learned, 2 cut off, 3 learned to be avoided."""

    tokens: list[tuple[str, int]]
    total: int
    trained: int
    cut: int


class RowLoss(Schema):
    """Mean loss in nats per learned token before training and at its end."""

    line: int
    before: float
    after: float
    tokens: int
    held_out: bool


class DatasetRow(Schema):
    """A row, with its tokens where a model was named. `refused` says why the model's template does not take it."""

    line: int
    row: dict[str, Any]
    loss: RowLoss | None
    cut_for_show: bool = False
    tokens: list[tuple[str, int]] | None = None
    total: int | None = None
    trained: int | None = None
    cut: int | None = None
    worse: Tokens | None = None
    refused: str | None = None


class DatasetRows(Schema):
    """One page of rows as the trainer sees them. Ask again while `status` is waiting or running."""

    object: Literal["dataset.rows"]
    dataset: str
    model: str | None
    cutoff: int = Field(description="Tokens after which a row is cut.")
    job: str | None = Field(description="The job whose losses are shown.")
    status: Inspected
    data: list[DatasetRow]
    matches: int | None
    has_more: bool
    lengths: dict[str, Any] | None = Field(description="How long the rows are in tokens, once they are counted.")


class Overlap(Schema):
    """A validation line, and the training line that says the same."""

    line: int
    train_line: int
    how: Literal["row", "prompt"]


class SplitRow(Schema):
    """A row of one side of a split."""

    line: int
    row: dict[str, Any]
    other_line: int | None = Field(description="The line of the other side with the same text.")


class DatasetSplit(Schema):
    """Both sides of a split, and what is on both. Ask again while `status` is waiting or running."""

    object: Literal["dataset.split"]
    status: Literal["reading", "waiting", "running", "ready", "error"]
    error: Problem | None
    train: int | None = None
    validation: int | None = None
    labels: list[tuple[str, int, int]] | None = Field(None, description="[label, training rows, validation rows], the most frequent first.")
    overlap: int | None = Field(None, description="Validation rows that are in the training set too.")
    whole: int | None = Field(None, description="Of these, rows that are the same as a whole.")
    examples: list[Overlap] | None = None
    drop: list[int] | None = Field(None, description="Lines to remove, so that nothing is on both sides.")
    rows: list[SplitRow] | None = Field(None, description="One page of the rows of the side that was asked for.")
