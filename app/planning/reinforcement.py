"""Checks of a job for reinforcement before it is created."""

from __future__ import annotations

from app.errors import BadField
from app.objectives.reinforcement import ReinforcementSettings
from app.planning.feasibility import longest_row
from app.run_settings import RunSettings
from app.shapes import Shape
from app.strategies import Strategy
from app.strategies._peft import PeftStrategy


def refuse_drawn(strategy: Strategy, run: RunSettings, own: ReinforcementSettings, shape: Shape) -> None:
    """Raises BadField for settings of reinforcement that cannot be honored."""
    for name in ("batch_size", "micro_batches", "gradient_accumulation_steps"):
        if getattr(run, name) != RunSettings.model_fields[name].default:
            raise BadField(
                "A step of reinforcement has prompts_per_step prompts, whose answers are packed to max_tokens_per_step tokens a pass.",
                hint=f"Leave {name} out.",
                param=f"run.{name}",
                code="setting_without_use",
            )
    room = longest_row(run, shape) - strategy.virtual_tokens()
    if own.answer_tokens >= room:
        raise BadField(
            f"Answers of {own.answer_tokens} tokens leave no room for a prompt: a row may have {room}.",
            hint="Lower answer_tokens, or raise the max sequence length.",
            param="preference.answer_tokens",
        )
    if own.kl and getattr(strategy, "bias", "none") != "none":
        raise BadField(
            "The KL penalty compares with the base by switching an adapter off, and biases that were trained stay.",
            hint="Set kl to 0, or leave bias out.",
            param="preference.kl",
            code="setting_without_use",
        )
    if own.kl and not isinstance(strategy, PeftStrategy):
        raise BadField(
            f"The KL penalty compares with the base by switching an adapter off, and {strategy.title} has none.",
            hint="Set kl to 0, or use LoRA.",
            param="preference.kl",
            code="setting_without_use",
        )
