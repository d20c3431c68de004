"""Exports: models written in formats for other programs."""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, Field

from app.schemas.base import Problem, Schema


class CreateExport(Schema):
    """What is written of the model named in the path."""

    model_config = ConfigDict(extra="forbid")

    format: str = Field(description="Name of an export format, as `gguf`.")
    types: list[str] | None = Field(None, max_length=20, description="Types of the files; empty takes the format's first.")
    system: str | None = Field(None, max_length=20_000, description="A system prompt for formats that hold one.")


class PushExport(Schema):
    """Where an export is pushed."""

    model_config = ConfigDict(extra="forbid")

    repo: str = Field(max_length=200, description="`owner/name` on the Hugging Face hub; it is created where it does not exist.")
    private: bool = Field(True, description="Whether the repository is private. A public one is not used for a private push.")
    token: str | None = Field(
        None,
        max_length=500,
        description="A token with write permission. It is deleted when the push ends; an admin may omit it where HF_TOKEN is set.",
    )


class HubPush(Schema):
    """The last push of an export to the hub."""

    repo: str
    private: bool
    status: Literal["queued", "running", "succeeded", "failed", "cancelled"]
    progress: float | None = Field(description="0 to 1.")
    url: str | None = Field(description="Address of the repository, once it has succeeded.")
    commit: str | None
    error: Problem | None


class ExportFile(Schema):
    """One file, at `url` once the export has succeeded."""

    name: str
    type: str
    bytes: int
    sha256: str
    notes: list[str] = Field(description="Where the file differs from what its type promises.")
    url: str


class ParityFault(Schema):
    """Why a file does not answer as the model does."""

    cause: Literal["template", "tokens", "bos", "end", "positions", "adapter", "weights"]
    message: str


class ParityAnswer(Schema):
    """A prompt, and the greedy answer of the model in the studio."""

    prompt: str
    answer: str


class FileAnswer(Schema):
    """How a file answers the prompt of the same place in `answers` of the table."""

    parts_at: int | None = Field(description="The first token of the answer that differs, from 0; null where the answers are the same.")
    answer: str | None = Field(description="The file's answer where it differs.")
    behind: float | None = Field(
        description="How much less likely the file's token was there in the studio than the studio's own, in nats; null beyond its 20 likeliest."
    )


class ParityScore(Schema):
    """The score of the task on validation rows, in the studio and from a file."""

    metric: Literal["loss", "accuracy"] = Field(description="Loss in nats per token; accuracy where every answer is one of a few labels.")
    rows: int
    here: float = Field(description="The score in the studio.")
    there: float = Field(description="The score from the file.")
    interval: list[float] | None = Field(description="95% interval of the change, over the rows.")
    kept: bool = Field(description="Whether the file keeps the score: worse by at most one percent.")


class ParityLine(Schema):
    """One file run in the program that it is for, compared with the model in the studio."""

    type: str
    bytes: int
    prompts: int = Field(description="Prompts that were rendered by both.")
    identical: int = Field(description="Prompts whose token ids are the same.")
    places: int = Field(description="Places of the answers where the next token was compared.")
    kl: float | None = Field(description="KL divergence of the next token, nats, mean over the places.")
    top1: float | None = Field(description="Share of the places where the most likely token is the same.")
    limit: float = Field(description="KL that rounding to the type explains.")
    answers: list[FileAnswer]
    same_answers: int = Field(description="Prompts whose greedy answers are the same, token by token.")
    score: ParityScore | None
    tokens_per_second: float
    verdict: str = Field(description="In words, how the file answers: `as the model` only where all answers are the same.")
    faults: list[ParityFault]


class Parity(Schema):
    """The parity table; `skipped` says why there is none."""

    program: str
    rows: str = Field(description="Which rows were compared.")
    answers: list[ParityAnswer] = Field(description="Prompts whose whole answers were compared.")
    smallest: str | None = Field(description="The smallest type that keeps the score.")
    lines: list[ParityLine]
    seconds: float
    skipped: str | None


class Export(Schema):
    """An export of a model, and how far it is."""

    id: str
    object: Literal["export"]
    model: str
    format: str
    types: list[str]
    status: Literal["queued", "running", "succeeded", "failed", "cancelled"]
    progress: float | None = Field(description="0 to 1.")
    stage: str | None
    files: list[ExportFile]
    parity: Parity | None
    error: Problem | None
    hub: HubPush | None
    created_at: int = Field(description="Seconds since 1970.")
    finished_at: int | None
