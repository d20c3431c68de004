"""Blind votes between two answers."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from app.schemas.base import Schema


class Vote(Schema):
    """Two answers side by side. The models are revealed once the vote is cast."""

    id: str
    object: Literal["vote"]
    messages: list[dict[str, Any]]
    left: str
    right: str
    choice: Literal[0, 1, 2] | None = Field(description="1 the left answer, 2 the right one, 0 a tie; null while nobody has chosen.")
    edited: str | None
    left_model: str | None = None
    right_model: str | None = None
    created_at: int


class VoteScore(Schema):
    """One pair of models: shares and tests over the votes that are not ties."""

    first: str
    second: str
    won: int
    lost: int
    tied: int
    votes: int
    decided: int
    rate: float | None
    interval: tuple[float, float]
    p: float = Field(description="Of an exact sign test.")
    verdict: str


class VoteScores(Schema):
    """Every pair that was voted on, most votes first."""

    object: Literal["list"]
    data: list[VoteScore]
