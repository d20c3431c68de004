"""New dense layers on a frozen model."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from pydantic import Field

from app.languages import gettext, mark
from app.objectives import OBJECTIVES
from app.shapes import Shape
from app.strategies._advice import MANY_PER_CLASS, Facts, Reason, by_balance, labeled, rows_a_class, told_apart
from app.strategies._base import Loading
from app.strategies._files import read_weights
from app.strategies._model import final_norm, transformer
from app.strategies._modules import NAME, Added, loading
from app.strategies.bottleneck_adapter import make_bottleneck

if TYPE_CHECKING:
    import torch


class DenseHead(Added):
    """Classification: dense layers over the pooled state, then the classes. Generation: a residual block between the
    last norm and the output layer, zero at the start, so the model starts as it was."""

    name: Literal["dense_head"] = "dense_head"
    title: ClassVar = mark("Trainable head")
    family: ClassVar = "partial"
    summary: ClassVar = mark("New dense layers on top; the model below is frozen.")
    when_to_use: ClassVar = mark(
        "For classes, when there are a few thousand labeled texts or more; for text, to shift word choice without changing what is read."
    )
    paper: ClassVar = (
        "Peters et al. 2019, To Tune or Not to Tune? Adapting Pretrained Representations to Diverse Tasks",
        "https://arxiv.org/abs/1903.05987",
    )
    place: ClassVar = 25
    default_learning_rate: ClassVar = 1e-3

    width: int = Field(256, ge=1, le=65_536, description=mark("Hidden size of the new layers."), json_schema_extra={"basic": True})
    depth: int = Field(1, ge=1, le=8, description=mark("Number of hidden layers."))
    dropout: float = Field(0.1, ge=0, lt=1, description=mark("Fraction of the new layers' inputs dropped at random during training."))
    activation: Literal["gelu", "relu", "silu"] = Field("gelu", description=mark("Activation function between the layers."))

    def label_reasons(self, facts: Facts) -> list[Reason]:
        """With many labeled rows dense layers on the frozen model pay off, unless that model's states do not separate the classes."""
        words, least, large = labeled(facts)
        if told_apart(facts) is False:
            own = Reason(-14, gettext("The frozen vectors hardly separate these classes, and new layers on top see nothing else."))
        elif large:
            own = Reason(55, gettext("%(rows)s: enough to train new layers on top, while the model itself stays unchanged.", rows=words))
        elif least >= MANY_PER_CLASS:
            own = Reason(28, gettext("%(rows)s: enough to train new layers on the frozen model.", rows=words))
        else:
            own = Reason(-5, gettext("%(rows)s are few for new layers; feature extraction overfits less.", rows=rows_a_class(facts)))
        return [own, *by_balance(self.family, facts)]

    def trainable(self, shape: Shape) -> int:
        return 2 * shape.hidden * self.width + self.width + shape.hidden

    def trainable_parameters(self, shape: Shape, *, task: str = "generation", labels: int = 0) -> int:
        return self.head_parameters(shape, labels) if OBJECTIVES[task].heads else self.trainable(shape)

    def head_parameters(self, shape: Shape, labels: int) -> int:
        first = shape.hidden * self.width + self.width
        return first + (self.depth - 1) * (self.width * self.width + self.width) + self.width * labels + labels

    def reaches(self, shape: Shape) -> int:
        return 0

    @classmethod
    def drawing(cls) -> dict[str, Any]:
        return {"layers": ["frozen"] * 6, "head": True}

    def attach(self, model: torch.nn.Module, *, task: str = "generation", labels: int = 0) -> torch.nn.Module:
        model.requires_grad_(False)
        if not OBJECTIVES[task].heads:
            self.install(model)
        return model

    def install(self, model: torch.nn.Module) -> None:
        norm = final_norm(model)
        assert norm is not None, "it is a decoder: nothing else writes text"
        block = make_bottleneck(transformer(model).config.hidden_size, self.width, self.activation, scale=1.0)
        norm.add_module(NAME, block.to(cast("torch.nn.LayerNorm", norm).weight.device))
        norm.register_forward_hook(_after_norm)

    def load(self, model: torch.nn.Module, folder: Path) -> torch.nn.Module:
        # A classifier's dense layers are its head, which is saved with the adapter: then there is nothing to attach here.
        return super().load(model, folder) if read_weights(folder) else model

    def loading(self, *, task: str = "generation") -> Loading:
        return Loading() if OBJECTIVES[task].heads else loading(self.activation)

    def head_code(self, hidden: int, labels: int) -> str:
        bend = {"gelu": "torch.nn.GELU()", "relu": "torch.nn.ReLU()", "silu": "torch.nn.SiLU()"}[self.activation]
        widths = [hidden] + [self.width] * self.depth
        layers = [f"torch.nn.Dropout(), torch.nn.Linear({a}, {b}), {bend}" for a, b in itertools.pairwise(widths)]
        return f"torch.nn.Sequential({', '.join(layers)}, torch.nn.Linear({self.width}, {labels}))"

    def head(self, hidden: int, labels: int) -> torch.nn.Module:
        import torch

        bend = {"gelu": torch.nn.GELU, "relu": torch.nn.ReLU, "silu": torch.nn.SiLU}[self.activation]
        layers: list[torch.nn.Module] = []
        for width in [hidden] + [self.width] * (self.depth - 1):
            layers += [torch.nn.Dropout(self.dropout), torch.nn.Linear(width, self.width), bend()]
        return torch.nn.Sequential(*layers, torch.nn.Linear(self.width, labels))


def _after_norm(module: torch.nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
    added: torch.Tensor = getattr(module, NAME)(output)
    return output + added
