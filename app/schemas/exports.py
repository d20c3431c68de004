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


class ParityLine(Schema):
    """One file run in the program that it is for, compared with the model in the studio."""

    type: str
    bytes: int
    prompts: int = Field(description="Prompts that were rendered by both.")
    identical: int = Field(description="Prompts whose token ids are the same.")
    places: int = Field(description="Places of the answers where the next token was compared.")
    kl: float | None = Field(description="KL divergence of the next token, nats, mean over the places.")
    top1: float | None = Field(description="Share of the places where the most likely token is the same.")
    loss: float | None = Field(description="Loss on the answers, nats per token.")
    loss_here: float | None = Field(description="The same in the studio.")
    limit: float = Field(description="KL that rounding to the type explains.")
    tokens_per_second: float
    faults: list[ParityFault]


class Parity(Schema):
    """The parity table; `skipped` says why there is none."""

    program: str
    rows: str = Field(description="Which rows were compared.")
    smallest: str | None = Field(
        description="The smallest type whose loss on the answers rises by at most one percent, with nine of ten tokens the same."
    )
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
