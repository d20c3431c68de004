"""Datasets: their versions, reports, rows and splits."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from app.objectives import Task
from app.schemas.base import Problem, Schema

Severity = Literal["error", "warning", "note"]


class SuggestedReading(Schema):
    """A body for `POST /v1/datasets/{key}/reparse` that fits the file's values."""

    format: str
    mapping: dict[str, str] = Field(description="Field of the format to column of the file.")


class ReadingProblem(Problem):
    """Why a file could not be parsed: the file, and the first invalid line if there is one. Where the columns match no format,
    `columns`, `preview`, `suggested` and `mappings` help to choose a mapping."""

    file: str | None = None
    rule: str | None = Field(None, description="The rule that the line breaks, as in a report's findings.")
    value: str | None = Field(None, description="The value found there.")
    repair: str | None = Field(None, description="How most of the file's lines can be repaired, where a fix for them is known.")
    columns: list[str] | None = Field(None, description="Columns of the file.")
    preview: list[dict[str, str]] | None = Field(None, description="The first rows as they are in the file, long values cut.")
    suggested: SuggestedReading | None = Field(None, description="Judged by the values. Nothing is read so until it is confirmed.")
    mappings: dict[str, dict[str, str]] | None = Field(None, description="The likeliest mapping for each format.")


class Dataset(Schema):
    """One version of a dataset. `origin` says how it was created, and from what."""

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
    """An issue that was selected and has no automatic fix."""

    finding: int
    line: int | None
    rule: str
    message: str
    why: str


class FixedDataset(Dataset):
    """A version created by fixing another."""

    fixed: int | None = Field(description="Rows that the fixes change or remove; null where a whole file is repaired.")
    unfixed: list[UnfixedFinding]


class Change(Schema):
    """A changed row: before and after; null where a version has no such row. Long rows are shortened."""

    line: int
    kind: Literal["removed", "relabeled", "edited", "added"]
    before: dict[str, Any] | None
    after: dict[str, Any] | None


class DatasetChanges(Schema):
    """The changes of a version against its parent. Poll while `status` is waiting or running."""

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
    """A dataset created from votes."""

    id: str
    object: Literal["dataset"]
    name: str
    status: Literal["reading", "ready", "error"]


class FindingFix(Schema):
    """How an issue can be fixed by one click or request."""

    label: str
    operation: str = Field(description="`choose` is no automatic fix: rows contradict each other, and one of them is edited or removed.")
    arguments: dict[str, Any]


class Finding(Schema):
    """One issue of one row. An error excludes the row; a warning or note does not."""

    id: int
    line: int | None
    column: str | None = Field(description="A path into the row, as messages[2].content.")
    rule: str
    severity: Severity
    value: str | None
    message: str
    fix: FindingFix | None


class RuleCount(Schema):
    """Number of issues of a rule, with an example."""

    rule: str
    severity: Severity
    count: int
    message: str


class UnknownRole(Schema):
    """An unknown role name. Its rows are excluded until `POST /v1/datasets/{key}/fixes` maps it to a role."""

    role: str
    messages: int
    suggested: Literal["user", "assistant", "system", "tool"] | None


class TokenSuggestion(Schema):
    """A string that the tokenizer splits into many pieces: how often it was found, and the tokens fewer if it were one."""

    text: str
    count: int
    saved: int


class DatasetReport(Schema):
    """The report of a version, with one page of its issues."""

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
    new_tokens: list[TokenSuggestion] = Field(
        description="Strings that would save most tokens as `run.new_tokens` of a job on the model that counted, of the first two million characters."
    )
    rules: list[RuleCount]
    unknown_roles: list[UnknownRole]
    findings: list[Finding]
    has_more: bool


class FailedReading(Schema):
    """A newer parse of the same file, which failed, so that an older one is used."""

    dataset: str
    version: int
    error: ReadingProblem | None


class FileReport(DatasetReport):
    """The report of the newest valid parse of a file."""

    failed_later: FailedReading | None


Inspected = Literal["waiting", "running", "ready", "error"]


class LineProblem(Schema):
    """An issue of a line of the file."""

    rule: str
    message: str
    column: str | None
    value: str | None
    severity: Severity
    fix: FindingFix | None


class DatasetLine(Schema):
    """A line of the file, unparsed. Poll while `status` is waiting or running."""

    object: Literal["dataset.line"]
    line: int
    status: Inspected
    error: Problem | None
    text: str | None = Field(description="Null where the file has no such line, or where it is too long to be shown.")
    problems: list[LineProblem]


class Tokens(Schema):
    """A sequence as a model reads it. A token is [text, state]: 0 masked, 1 trained, 2 truncated, 3 trained to be avoided."""

    tokens: list[tuple[str, int]]
    total: int
    trained: int
    cut: int


class RowLoss(Schema):
    """Mean loss in nats per trained token before training and at its end."""

    line: int
    before: float
    after: float
    tokens: int
    held_out: bool


class DatasetRow(Schema):
    """A row, with its tokens where a model was given. `refused` says why the model's chat template rejects it."""

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
    """One page of rows as the trainer sees them. Poll while `status` is waiting or running."""

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
    """A validation line, and a training line with the same content."""

    line: int
    train_line: int
    how: Literal["row", "prompt"]


class SplitRow(Schema):
    """A row of one side of a split."""

    line: int
    row: dict[str, Any]
    other_line: int | None = Field(description="The line of the other side with the same text.")


class DatasetSplit(Schema):
    """Both sides of a split, and the rows that are on both. Poll while `status` is waiting or running."""

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
