"""Expert settings of LoRA: single modules, the initialization of A, and a learning rate of its own for B."""

from __future__ import annotations

import fnmatch
import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator

from app.languages import mark
from app.shapes import Linear, Shape
from app.strategies._low_rank import LowRank

MAX_NAMES = 64


def _listed(value: Any) -> Any:
    """A list of names, which other trainers take, as the text that is stored; other values unchanged."""
    if isinstance(value, list | tuple) and all(isinstance(name, str) for name in value):
        return ", ".join(value)
    return value


ModuleNames = Annotated[str, BeforeValidator(_listed)]


class ChosenLowRank(LowRank):
    target_modules: ModuleNames | None = Field(
        None,
        min_length=1,
        max_length=2000,
        description=mark(
            "Names of the modules that are trained in addition, instead of a preset: q_proj, v_proj. A name may be the end of a whole one, "
            "and * matches anything: layers.[01].*.q_proj."
        ),
        exclude_if=lambda names: names is None,
    )
    init_lora_weights: Literal["default", "gaussian"] = Field(
        "default",
        title=mark("Init LoRA weights"),
        description=mark("How A begins: default is uniform (Kaiming), gaussian has a deviation of 1 / rank. B begins at zero."),
        exclude_if=lambda kind: kind == "default",
    )
    loraplus_lr_ratio: float | None = Field(
        None,
        ge=1,
        le=1000,
        title=mark("LoRA+ LR ratio"),
        description=mark(
            "LoRA+: how many times the learning rate B learns at (Hayou et al. 2024 advise 16). Empty gives A and B the same."
        ),
        exclude_if=lambda ratio: ratio is None,
    )

    @field_validator("target_modules")
    @classmethod
    def _instead_of_layers(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and info.data.get("layers", "all-linear") != "all-linear":
            raise ValueError("It means the same as layers, which was given too: omit one of the two")
        if value is not None and not 0 < len(names_in(value)) <= MAX_NAMES:
            raise ValueError(f"It takes 1 to {MAX_NAMES} names: write q_proj, v_proj, or leave it empty")
        return value

    def unknown_modules(self, shape: Shape) -> list[str]:
        """The names that match no module of such a model."""
        return [
            name for name in names_in(self.target_modules) if not any(_pattern(name).match(f".{whole}") for whole, _ in shape.modules())
        ]

    def _found(self, shape: Shape) -> list[tuple[str, Linear]]:
        patterns = [_pattern(name) for name in names_in(self.target_modules)]
        return [(whole, linear) for whole, linear in shape.modules() if any(pattern.match(f".{whole}") for pattern in patterns)]

    def chosen(self, shape: Shape) -> list[Linear]:
        return super().chosen(shape) if self.target_modules is None else [linear for _, linear in self._found(shape)]

    def targets(self, shape: Shape) -> list[str]:
        """With modules of single blocks, all modules that any block has: an upper bound of what is kept for the backward pass."""
        if self.target_modules is None:
            return super().targets(shape)
        found = {linear.name for _, linear in self._found(shape)}
        return [linear.name for linear in shape.linears() if linear.name in found]

    def peft_targets(self, shape: Shape) -> list[str] | str:
        """Whole names without the model's own first part, which a classifier's backbone does not have."""
        if self.target_modules is None:
            return super().peft_targets(shape)
        return [whole.partition(".")[2] for whole, _ in self._found(shape)]

    def rate_scale(self, parameter: str) -> float:
        return self.loraplus_lr_ratio or 1.0 if ".lora_B." in parameter else 1.0

    def variant(self) -> dict[str, Any]:
        return {"init_lora_weights": "gaussian"} if self.init_lora_weights == "gaussian" else {}


def names_in(given: str | None) -> list[str]:
    return [name for name in re.split(r"[,\s]+", given or "") if name]


def _pattern(name: str) -> re.Pattern[str]:
    """Matches a period and the whole name of a module that is `name` or ends in it. Patterns are shell patterns, which do not
    backtrack exponentially as an arbitrary regular expression would."""
    return re.compile(fnmatch.translate(f"*.{name}"))
