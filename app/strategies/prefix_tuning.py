"""Prefix tuning: trained keys and values before every layer's input."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from app.languages import gettext, mark
from app.shapes import Shape, shape_of
from app.strategies._model import transformer
from app.strategies._soft_prompt import SoftPrompt, install_in_attention, make_table, task_type

if TYPE_CHECKING:
    import torch


_OPEN_ENCODERS = ("bert", "roberta", "xlm-roberta", "electra")
"""Encoders whose attention calls a given cache before it uses its keys and values."""


class PrefixTuning(SoftPrompt):
    name: Literal["prefix_tuning"] = "prefix_tuning"
    title: ClassVar = mark("Prefix tuning")
    summary: ClassVar = mark("Trains a few vectors (keys and values) placed before every layer's input.")
    when_to_use: ClassVar = mark(
        "For a change of style or format that must be switched on and off at will. Stronger than prompt tuning, still small."
    )
    paper: ClassVar = ("Li and Liang 2021, Prefix-Tuning: Optimizing Continuous Prompts for Generation", "https://arxiv.org/abs/2101.00190")
    place: ClassVar = 21
    suits: ClassVar = ("close data",)
    default_learning_rate: ClassVar = 3e-2
    any_architecture: ClassVar = False

    def trainable(self, shape: Shape) -> int:
        return self.tokens * shape.layers * 2 * shape.kv_heads * shape.head_dim

    def unavailable(self, shape: Shape, *, task: str = "generation", cuda: bool = False) -> str | None:
        if shape.architecture == "encoder" and shape.model_type not in _OPEN_ENCODERS:
            return gettext(
                "The attention of %(model)s takes no keys and values from outside. Choose prompt_tuning, which works on its input.",
                model=shape.model_type,
            )
        return super().unavailable(shape, task=task, cuda=cuda)

    @classmethod
    def drawing(cls) -> dict[str, Any]:
        return {"layers": ["frozen"] * 6, "before": True}

    def table(self, model: torch.nn.Module) -> torch.nn.Module:
        import torch

        shape = shape_of(transformer(model).config.to_dict())
        return make_table(torch.randn(self.tokens, shape.layers * 2 * shape.kv_heads * shape.head_dim) * 0.02)

    def install(self, model: torch.nn.Module, table: torch.nn.Module) -> None:
        install_in_attention(model, table)

    def peft_config(self, model: torch.nn.Module) -> Any:
        from peft import PrefixTuningConfig

        shape = shape_of(transformer(model).config.to_dict())
        return PrefixTuningConfig(
            task_type=task_type(model),
            num_virtual_tokens=self.tokens,
            token_dim=shape.kv_heads * shape.head_dim,
            num_transformer_submodules=1,
            num_attention_heads=shape.kv_heads,
            num_layers=shape.layers,
            encoder_hidden_size=shape.hidden,
            prefix_projection=False,
        )
