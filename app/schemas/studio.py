"""The studio itself: its health, its strategies, and its recommendations."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from app.evaluation.advice import Tune
from app.evaluation.advice_cards import AdviceStep, Card
from app.objectives import Task
from app.planning.advisor import Advice, AdviceDetail, AdviceGroup, AdviceRule, CostEstimate
from app.schemas.base import Schema
from app.schemas.evaluations import Evaluation
from app.strategies._advice import Facts
from app.strategies._base import Family
from app.views.overview import HealthCheck, WorkerRole


class Studio(Schema):
    """The health of every component."""

    object: Literal["studio"]
    checks: list[HealthCheck]
    workers: list[WorkerRole]
    versions: dict[str, str]


class Paper(Schema):
    """The paper that introduced a strategy."""

    citation: str
    url: str


class Strategy(Schema):
    """A fine-tuning method. With a model or a task in the query, `available` and `reason` refer to these; with a dataset,
    `advised` and `cost` are set too."""

    object: Literal["strategy"]
    name: str
    title: str
    family: Family
    tasks: list[Task]
    summary: str
    when_to_use: str
    forgets: Literal["little", "some", "much"]
    adapter: bool
    merges: bool
    default_learning_rate: float
    preference_learning_rate: float | None
    paper: Paper | None
    settings: dict[str, Any] = Field(alias="schema", description="JSON schema of its settings.")
    available: bool
    reason: str | None
    advised: bool = False
    cost: CostEstimate | None = None


class StrategyAdvice(Schema):
    """Whether to fine-tune at all, and with which method, with the facts behind it."""

    object: Literal["advice"]
    model: str
    dataset: str
    dataset_id: str
    facts: Facts
    tune: Tune
    cards: list[Card]
    steps: list[AdviceStep]
    details: list[AdviceDetail] = Field(description="The first places in full; no sentence comes twice.")
    groups: list[AdviceGroup] = Field(description="The places behind them, by family.")
    ranking: list[Advice]
    rules: list[AdviceRule]
    evaluation: Evaluation | None
    how_to_measure: str | None


class OpenAPIDocument(Schema):
    """A document of OpenAPI 3.1."""

    openapi: str
    info: dict[str, Any]
    paths: dict[str, Any]
    components: dict[str, Any]
    servers: list[dict[str, Any]]
    security: list[dict[str, Any]]
    tags: list[dict[str, Any]]
