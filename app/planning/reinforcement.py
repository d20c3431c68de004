"""Checks of a job that trains on answers which it draws, before it is created."""

from __future__ import annotations

from app.errors import BadField
from app.graders import SimulatedTools
from app.languages import gettext
from app.objectives import DrawnSettings
from app.objectives.reinforcement import ReinforcementSettings
from app.planning.feasibility import longest_row
from app.run_settings import RunSettings
from app.shapes import Shape
from app.strategies import Strategy
from app.strategies._peft import PeftStrategy


def refuse_drawn(strategy: Strategy, run: RunSettings, own: DrawnSettings, shape: Shape) -> None:
    """Raises BadField for settings of a job that draws answers which cannot be honored."""
    for name in ("batch_size", "micro_batches", "gradient_accumulation_steps"):
        if getattr(run, name) != RunSettings.model_fields[name].default:
            raise BadField(
                gettext("A step has prompts_per_step prompts, whose answers are packed to max_tokens_per_step tokens a pass."),
                hint=gettext("Leave %(name)s out.", name=name),
                param=f"run.{name}",
                code="setting_without_use",
            )
    room = longest_row(run, shape) - strategy.virtual_tokens()
    if own.answer_tokens >= room:
        raise BadField(
            gettext(
                "Answers of %(tokens)s tokens leave no room for a prompt: a row may have %(room)s.", tokens=own.answer_tokens, room=room
            ),
            hint=gettext("Lower answer_tokens, or raise the max sequence length."),
            param="preference.answer_tokens",
        )
    if isinstance(own, ReinforcementSettings):
        _refuse_tools(own)
    if isinstance(own, ReinforcementSettings) and own.reads_base:
        _refuse_base(strategy, "kl" if own.kl else "max_kl")


def _refuse_tools(own: ReinforcementSettings) -> None:
    """Raises BadField for simulated tools that would not be asked, or whose code does not run."""
    if own.tool_source and own.max_turns == 1:
        raise BadField(
            gettext("With max_turns 1 no tool is asked, so its code has no use."),
            hint=gettext("Raise max_turns, or leave tool_source out."),
            param="preference.tool_source",
            code="setting_without_use",
        )
    SimulatedTools(own.tool_source).prove("preference.tool_source")


def refuse_server(strategy: Strategy, run: RunSettings, own: object, *, served: bool, processes: int) -> None:
    """Raises BadField where a server shall draw the answers and cannot. `served`: one that takes tokens answers for the base model."""
    if not isinstance(own, ReinforcementSettings) or own.sampler == "worker":
        return
    besides = getattr(strategy, "bias", "none") != "none" or getattr(strategy, "modules_to_save", None)
    if not served:
        reason = gettext("No server that takes tokens answers for this base model.")
        hint = gettext("List it in LUTHIER_ENGINES and choose it on the model's page, or let the worker draw.")
    elif not strategy.plain_lora or besides or run.new_tokens:
        reason = gettext("A server loads plain LoRA only, without biases, tables of words or new tokens.")
        hint = gettext("Choose LoRA, or let the worker draw.")
    elif own.max_turns > 1:
        reason = gettext("Tools answer only where the worker draws.")
        hint = gettext("Leave max_turns or sampler out.")
    elif processes > 1:
        reason = gettext("A job of several processes draws by itself.")
        hint = gettext("Ask for one GPU, or let the worker draw.")
    else:
        return
    raise BadField(reason, hint=hint, param="preference.sampler")


def _refuse_base(strategy: Strategy, name: str) -> None:
    """Raises BadField where the base cannot be read in between, which the setting `name` asks for."""
    if getattr(strategy, "bias", "none") != "none":
        reason = gettext("%(name)s compares with the base by switching an adapter off, and biases that were trained stay.", name=name)
        hint = gettext("Leave %(name)s or bias out.", name=name)
    elif not isinstance(strategy, PeftStrategy):
        reason = gettext(
            "%(name)s compares with the base by switching an adapter off, and %(method)s has none.",
            name=name,
            method=gettext(strategy.title),
        )
        hint = gettext("Leave %(name)s out, or use LoRA.", name=name)
    else:
        return
    raise BadField(reason, hint=hint, param=f"preference.{name}", code="setting_without_use")
