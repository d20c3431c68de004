"""Searches: the best settings by successive halving, and the winner repeated."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from app.objectives import SETTINGS
from app.run_settings import RunSettings
from app.schemas.base import UNBUILT, Schema
from app.schemas.comparisons import RefusedStrategy
from app.searches.space import SearchOrder
from app.strategies import AnyStrategy


class CreateSearch(SearchOrder):
    """The data, the methods and what may be changed of them, and how long. `run` and `preference` apply to all trials."""

    model_config = UNBUILT

    strategies: list[str | AnyStrategy] = Field(  # type: ignore[assignment]  # as documents show it
        ["lora"], min_length=1, max_length=10, description="Names, or strategies with their settings as a job takes them."
    )
    run: RunSettings = Field(default_factory=RunSettings)  # type: ignore[assignment]
    preference: SETTINGS | None = None


class SearchPlan(Schema):
    """What a search would try. Nothing was queued."""

    object: Literal["search.plan"]
    trials: int = Field(description="As many as fit the minutes, where there is a limit.")
    rungs: list[int] = Field(description="How many trials reach each rung, and the end.")
    epochs: list[float]
    seconds: float = Field(description="Of all trials and one repetition, one after the other.")
    refused: list[RefusedStrategy]


class TrialEntry(Schema):
    """One run of a search: its settings, how far it came, and its score there."""

    number: int
    job: str
    status: Literal["queued", "running", "waiting", "pruned", "stopped", "succeeded", "failed", "cancelled"] = Field(
        description="waiting: at a rung, until the others are there; pruned: others were better at a rung; stopped: by hand, or as the time was over."
    )
    repeats: int | None = Field(description="The number of the trial that this run repeats with another seed.")
    title: str
    strategy: str
    params: dict[str, Any] = Field(description="learning_rate, epochs, and rank where the method has one.")
    seed: int
    step: int
    total_steps: int | None
    rung: int = Field(description="Rungs that it reached: 0 to 2, and 3 at its end.")
    score: float | None = Field(description="At the last rung that it reached.")
    loss: float | None
    scores: dict[str, float] = Field(description="Score by rung.")
    seconds: float = Field(description="That it held a machine.")
    reason: str | None = Field(description="Why it did not go on.")
    model: str | None = Field(description="The fine-tuned model.")
    kept: bool | None = Field(description="Whether pages offer its model.")


class SearchScore(Schema):
    """What trials are judged by."""

    key: str
    title: str
    less: bool = Field(description="Whether less is better.")


class Search(Schema):
    """The trials of a search, and the winner."""

    id: str
    object: Literal["search"]
    created_at: int = Field(description="Seconds since 1970.")
    ended_at: int | None
    name: str
    status: Literal["running", "succeeded", "failed", "cancelled"]
    model: str
    order: dict[str, Any] = Field(description="The request as it came.")
    score: SearchScore
    trials: int = Field(description="Trials that are tried: as many as fit the minutes, where there is a limit.")
    seconds: float = Field(description="Machine time of all runs so far.")
    minutes: float | None = Field(description="The limit of it.")
    data: list[TrialEntry]
    winner: int | None = Field(description="Number of the trial that was repeated and leads with both results counted.")
    best: int | None = Field(description="The winner, or the best of the trials that ended where none could be called one.")
    says: str | None = Field(description="The conclusion, or what it waits for.")
    refused: list[RefusedStrategy]
