"""What every grader has: its fields, how it is checked when it is saved, and how it grades one answer."""

from __future__ import annotations

import functools
import json
import math
from abc import abstractmethod
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from app.graders._tool_calls import calls_in
from app.kit.humanize import human_number
from app.kit.json_safe import finite, too_deep
from app.languages import gettext, mark

JSON = dict[str, Any]
MAX_TEXT = 1 << 20
"""Characters of an answer and of a filled template."""

ErrorKind = Literal[
    "formula_parse_error",
    "invalid_variable_error",
    "model_grader_parse_error",
    "model_grader_refusal_error",
    "model_grader_server_error",
    "other_error",
    "python_grader_runtime_error",
    "python_grader_server_error",
    "sample_parse_error",
    "truncated_observation_error",
    "unresponsive_reward_error",
]
"""Names of errors in OpenAI's answer."""


class GradeError(Exception):
    """An answer that could not be graded. Such a row has no score; it does not count as 0."""

    def __init__(self, kind: ErrorKind, message: str) -> None:
        super().__init__(message)
        self.kind, self.message = kind, message


# What a grader reads --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GradedSample:
    """A model's answer, which is the namespace `sample` of templates and of Python graders."""

    output_text: str
    tools: Sequence[JSON] | None = None  # None: they are read from the text

    @functools.cached_property
    def output_tools(self) -> list[JSON]:
        return list(self.tools) if self.tools is not None else calls_in(self.output_text)

    @functools.cached_property
    def output_json(self) -> Any:
        """The answer as JSON. Raises GradeError."""
        if len(self.output_text) > MAX_TEXT:
            size = human_number(len(self.output_text))
            said = gettext("The answer has %(size)s characters; %(most)s is the most.", size=size, most=human_number(MAX_TEXT))
            raise GradeError("sample_parse_error", said)
        try:
            value = json.loads(self.output_text, parse_constant=_no_constant, parse_float=finite)
        except (ValueError, RecursionError) as error:
            raise GradeError("sample_parse_error", gettext("The answer is not JSON: %(error)s.", error=str(error)[:100])) from None
        if too_deep(value):
            raise GradeError("sample_parse_error", gettext("The answer is nested too deeply."))
        return value

    def value(self, name: str) -> Any:
        """One name of the namespace. Raises GradeError."""
        return self.choices() if name == "choices" else getattr(self, name)

    def choices(self) -> list[JSON]:
        message = {"role": "assistant", "content": self.output_text}
        return [{"index": 0, "message": message | ({"tool_calls": self.output_tools} if self.output_tools else {})}]

    def namespace(self) -> JSON:
        """Everything, for a Python grader; `output_json` is None where the answer is not JSON."""
        try:
            value = self.output_json
        except GradeError:
            value = None
        return {"output_text": self.output_text, "output_json": value, "output_tools": self.output_tools, "choices": self.choices()}


FIELDS = (
    mark("Input"),
    mark("Reference"),
    mark("Operation"),
    mark("Evaluation metric"),
    mark("Model"),
    mark("Tool"),
    mark("Arguments"),
    mark("Match"),
    mark("Graders"),
    mark("Calculate output"),
    mark("Unit"),
    mark("Min"),
    mark("Max"),
    mark("Tolerance"),
    mark("Relative"),
    mark("Labels"),
    mark("Passing labels"),
    mark("Range"),
    mark("Sampling params"),
    mark("Schema"),
    mark("Source"),
    mark("Image tag"),
    mark("Pattern"),
    mark("Ignore case"),
)
"""The fields' names as a form shows them: `app.kit.forms` makes them of the names in code."""
SAMPLE_NAMES = ("output_text", "output_json", "output_tools", "choices")


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


# What it asks of models -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class JudgeAsk:
    """A question to a model that judges."""

    model: str
    messages: tuple[JSON, ...]
    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int = 256
    seed: int = 0


@dataclass(frozen=True)
class EmbedAsk:
    """Texts to be embedded; without a model by the encoder of the project."""

    model: str | None
    texts: tuple[str, ...]


@dataclass(frozen=True)
class RewardAsk:
    """A conversation whose last message, an answer, gets a reward."""

    model: str
    messages: tuple[JSON, ...]


Ask = JudgeAsk | EmbedAsk | RewardAsk


@dataclass(frozen=True)
class Reply:
    """What came back: a text, a vector for each text, or a reward."""

    text: str = ""
    reward: float = 0.0
    vectors: tuple[tuple[float, ...], ...] = ()
    tokens: int = 0
    model: str = ""


# What it answers ------------------------------------------------------------------------------------------------------


@dataclass
class Result:
    """What a grader found. `reward` is in the grader's own range; `parts` are figures that it is made of."""

    reward: float
    parts: dict[str, float] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)  # by model


Steps = Generator[Ask, Reply, Result]


class Grader(BaseModel):
    """One grader. A subclass in `app/graders/NAME.py` with `type: Literal["NAME"]` is registered by being there."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)  # the web process starts without building them

    place: ClassVar[int] = 100  # order in lists, lowest first
    title: ClassVar[str]
    summary: ClassVar[str]  # one sentence
    example: ClassVar[JSON]  # what a form begins with
    ours: ClassVar[bool] = False  # not one of OpenAI's

    type: str
    name: str = Field(min_length=1, max_length=200, description=mark("Name of the grader."))

    @abstractmethod
    def steps(self, sample: GradedSample, item: JSON) -> Steps:
        """Grade one answer: yields questions to models, and returns the result. Raises GradeError."""

    def prove(self) -> None:
        """What takes longer than to validate fields, once, when it is saved. Raises BadField."""

    def models(self) -> Iterator[str | None]:
        """The models it asks; None is the encoder of the project."""
        yield from ()

    def bounds(self) -> tuple[float, float]:
        """The range of its reward."""
        return 0.0, 1.0

    def children(self) -> Mapping[str, Grader]:
        """The graders it consists of, by the names that a formula has for them."""
        return {}

    def score(self, reward: float) -> float:
        """A reward as a score, 0 to 1. Raises GradeError for one outside the range."""
        low, high = self.bounds()
        if not math.isfinite(reward) or not low - 1e-9 <= reward <= high + 1e-9:
            said = gettext(
                "The grader %(name)s gave %(reward)s; a score lies between %(low)s and %(high)s.",
                name=self.name,
                reward=format(reward, ".6g"),
                low=format(low, "g"),
                high=format(high, "g"),
            )
            raise GradeError("other_error", said)
        return min(1.0, max(0.0, (reward - low) / (high - low)))
