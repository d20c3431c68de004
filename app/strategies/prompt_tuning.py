"""Prompt tuning: trained vectors before the text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from app.languages import mark
from app.shapes import Shape
from app.strategies._model import transformer
from app.strategies._soft_prompt import SoftPrompt, install_in_embedding, make_table, task_type

if TYPE_CHECKING:
    import torch


class PromptTuning(SoftPrompt):
    name: Literal["prompt_tuning"] = "prompt_tuning"
    title: ClassVar = mark("Prompt tuning")
    summary: ClassVar = mark("Trains a soft prompt: vectors instead of words.")
    when_to_use: ClassVar = mark(
        "When the model can do the task already and only needs a good prompt. Slow to train, weak on small models, and tiny."
    )
    paper: ClassVar = ("Lester et al. 2021, The Power of Scale for Parameter-Efficient Prompt Tuning", "https://arxiv.org/abs/2104.08691")
    place: ClassVar = 60
    suits: ClassVar = ("few rows", "close data", "solved")
    unsuited: ClassVar = ("many rows", "far data")
    default_learning_rate: ClassVar = 3e-2

    def trainable(self, shape: Shape) -> int:
        return self.tokens * shape.hidden

    @classmethod
    def drawing(cls) -> dict[str, Any]:
        return {"layers": ["frozen"] * 6, "input": True}

    def table(self, model: torch.nn.Module) -> torch.nn.Module:
        # Embeddings of tokens drawn from the vocabulary are a better start than noise (the paper, section 3.2).
        import torch

        words = cast("torch.nn.Embedding", transformer(model).get_input_embeddings())
        drawn = torch.randint(words.num_embeddings, (self.tokens,), device=words.weight.device)
        return make_table(words(drawn))

    def install(self, model: torch.nn.Module, table: torch.nn.Module) -> None:
        install_in_embedding(model, table)

    def peft_config(self, model: torch.nn.Module) -> Any:
        from peft import PromptTuningConfig

        config = transformer(model).config
        return PromptTuningConfig(
            task_type=task_type(model),
            num_virtual_tokens=self.tokens,
            token_dim=config.hidden_size,
            num_transformer_submodules=1,
            num_attention_heads=getattr(config, "num_attention_heads", 1),  # a recurrent model has none
            num_layers=config.num_hidden_layers,
        )
