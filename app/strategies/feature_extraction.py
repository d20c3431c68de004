"""Feature extraction: a small classifier on the embeddings of a frozen model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from app.languages import mark
from app.shapes import Shape
from app.strategies._base import Strategy
from app.strategies._files import write_adapter

if TYPE_CHECKING:
    import torch


class FeatureExtraction(Strategy):
    """One embedding per text, computed once and cached; then logistic regression or a small dense network on the embeddings. The
    recipe is in `worker/training/feature_cache.py`."""

    name: Literal["feature_extraction"] = "feature_extraction"
    title: ClassVar = mark("Feature extraction (linear probe)")
    family: ClassVar = "feature"
    tasks: ClassVar = ("classification",)
    summary: ClassVar = mark("The model is frozen and embeds each text; a small classifier is trained on the vectors.")
    when_to_use: ClassVar = mark(
        "The first thing to try for classes: minutes on a laptop, no forgetting, and hard to beat with few examples."
    )
    paper: ClassVar = (
        "Peters et al. 2019, To Tune or Not to Tune? Adapting Pretrained Representations to Diverse Tasks",
        "https://arxiv.org/abs/1903.05987",
    )
    place: ClassVar = 5
    suits: ClassVar = ("close data", "solved")
    recipe: ClassVar = "features"
    default_learning_rate: ClassVar = 1e-3
    no_blend: ClassVar = mark("the model below it was never changed; only the classifier on top is new.")

    classifier: Literal["logistic", "dense"] = Field(
        "logistic",
        description=mark("logistic: logistic regression, C chosen by cross-validation. dense: one hidden layer."),
        json_schema_extra={"basic": True},
    )
    pooling: Literal["auto", "mean", "last", "first"] = Field(
        "auto", description=mark("Which hidden states make the vector. auto: the mean for encoders, the last token for decoders.")
    )
    regularisation: float | None = Field(
        None, gt=0, le=1e6, description=mark("Inverse regularization strength C of logistic regression. Leave empty for cross-validation.")
    )
    width: int = Field(256, ge=1, le=8192, description=mark("Hidden size of a dense classifier."))

    passes: int = Field(
        60, ge=1, le=10_000, description=mark("Epochs of a dense classifier; it stops early when validation does not improve.")
    )

    def unused(self) -> tuple[str, ...]:
        return ("width", "passes") if self.classifier == "logistic" else ("regularisation",)

    def trainable(self, shape: Shape) -> int:
        return 0

    def head_parameters(self, shape: Shape, labels: int) -> int:
        if self.classifier == "logistic":
            return shape.hidden * labels + labels
        return shape.hidden * self.width + self.width + self.width * labels + labels

    def reaches(self, shape: Shape) -> int:
        return 0

    @classmethod
    def drawing(cls) -> dict[str, Any]:
        return {"layers": ["frozen"] * 6, "head": True}

    def attach(self, model: torch.nn.Module, *, task: str = "classification", labels: int = 0) -> torch.nn.Module:
        return model.requires_grad_(False)

    def head(self, hidden: int, labels: int) -> torch.nn.Module:
        import torch

        if self.classifier == "logistic":
            return torch.nn.Linear(hidden, labels)
        return torch.nn.Sequential(torch.nn.Linear(hidden, self.width), torch.nn.GELU(), torch.nn.Linear(self.width, labels))

    def head_code(self, hidden: int, labels: int) -> str:
        if self.classifier == "logistic":
            return super().head_code(hidden, labels)
        return f"torch.nn.Sequential(torch.nn.Linear({hidden}, {self.width}), torch.nn.GELU(), torch.nn.Linear({self.width}, {labels}))"

    def save(self, model: torch.nn.Module, folder: Path) -> None:
        write_adapter(folder, self.describe(model), {})

    def load(self, model: torch.nn.Module, folder: Path) -> torch.nn.Module:
        return model
