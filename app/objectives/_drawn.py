"""The settings of objectives that train on answers which the model draws."""

from __future__ import annotations

from pydantic import Field

from app.languages import mark
from app.objectives._settings import ObjectiveSettings

DRAWN_FORMATS = ("chat", "sharegpt", "instruction", "completion")
"""Formats whose rows have a prompt."""


class DrawnSettings(ObjectiveSettings):
    """What a step draws."""

    group_size: int = Field(8, ge=2, le=64, description=mark("Answers drawn for each prompt."), json_schema_extra={"basic": True})
    prompts_per_step: int = Field(8, ge=1, le=512, description=mark("Prompts of a step."), json_schema_extra={"basic": True})
    answer_tokens: int = Field(256, ge=1, le=32_768, description=mark("Maximum tokens of an answer."), json_schema_extra={"basic": True})

    @property
    def updates(self) -> int:
        """Optimizer steps on the answers of one drawing."""
        return 1

    @property
    def turns(self) -> int:
        """Answers of one conversation, at most."""
        return 1
