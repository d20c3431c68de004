"""P-tuning: trained vectors before the text, computed by a small network."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from app.languages import mark
from app.shapes import Shape
from app.strategies._model import transformer
from app.strategies._soft_prompt import SoftPrompt, install_in_embedding, task_type

if TYPE_CHECKING:
    import torch


class PTuning(SoftPrompt):
    name: Literal["p_tuning"] = "p_tuning"
    title: ClassVar = "P-tuning"
    summary: ClassVar = mark("Trains a soft prompt through a small encoder network, which is more stable.")
    when_to_use: ClassVar = mark("Where prompt tuning trains too slowly. The network is discarded afterwards; only the vectors are kept.")
    paper: ClassVar = ("Liu et al. 2021, GPT Understands, Too", "https://arxiv.org/abs/2103.10385")
    place: ClassVar = 61
    default_learning_rate: ClassVar = 2e-2

    width: int = Field(128, ge=1, le=8192, description=mark("Hidden size of the encoder network."))

    def trainable(self, shape: Shape) -> int:
        h, w = shape.hidden, self.width
        return self.tokens * h + (h * w + w) + (w * w + w) + (w * h + h)

    @classmethod
    def drawing(cls) -> dict[str, Any]:
        return {"layers": ["frozen"] * 6, "input": True}

    def table(self, model: torch.nn.Module) -> torch.nn.Module:
        return _make_encoder(self.tokens, transformer(model).config.hidden_size, self.width)

    def install(self, model: torch.nn.Module, table: torch.nn.Module) -> None:
        install_in_embedding(model, table)

    def peft_config(self, model: torch.nn.Module) -> Any:
        from peft import PromptEncoderConfig

        config = transformer(model).config
        return PromptEncoderConfig(
            task_type=task_type(model),
            num_virtual_tokens=self.tokens,
            token_dim=config.hidden_size,
            num_transformer_submodules=1,
            num_attention_heads=getattr(config, "num_attention_heads", 1),  # a recurrent model has none
            num_layers=config.num_hidden_layers,
            encoder_hidden_size=self.width,
        )


def _make_encoder(tokens: int, hidden: int, width: int) -> torch.nn.Module:
    """A table computed by three dense layers, as in the paper's code for its multi-layer variant."""
    import torch

    class PromptEncoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows = torch.nn.Parameter(torch.randn(tokens, hidden) * 0.02)
            self.network = torch.nn.Sequential(
                torch.nn.Linear(hidden, width),
                torch.nn.ReLU(),
                torch.nn.Linear(width, width),
                torch.nn.ReLU(),
                torch.nn.Linear(width, hidden),
            )

        def forward(self) -> torch.Tensor:
            vectors: torch.Tensor = self.network(self.rows)
            return vectors

    return PromptEncoder()
