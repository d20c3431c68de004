"""Shared parts of strategies based on the peft library. The adapter's folder has peft's own layout, so
`PeftModel.from_pretrained(base, folder)` loads it anywhere."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from app.objectives import OBJECTIVES
from app.strategies._base import Loading, Strategy
from app.strategies._model import transformer, wrapped

if TYPE_CHECKING:
    import torch


class PeftStrategy(Strategy):
    scaled: ClassVar[tuple[str, ...]] = ()  # parts of the names of the adapter's weights in which its change is linear
    neutral: ClassVar[float] = 0.0  # the value of those weights that changes nothing

    def task_type(self, task: str) -> str:
        """peft's word for the model it wraps: a classifier is wrapped without its head."""
        return "FEATURE_EXTRACTION" if OBJECTIVES[task].heads else "CAUSAL_LM"

    @abstractmethod
    def config(self, model: torch.nn.Module, *, task: str) -> Any:
        """The `peft.PeftConfig` of these settings for this model."""

    def attach(self, model: torch.nn.Module, *, task: str = "generation", labels: int = 0) -> torch.nn.Module:
        from peft import get_peft_model

        config = self.config(model, task=task)
        if getattr(transformer(model).config, "is_encoder_decoder", False):
            config.task_type = "SEQ_2_SEQ_LM"
        attached: torch.nn.Module = get_peft_model(transformer(model), config)
        return attached

    def save(self, model: torch.nn.Module, folder: Path) -> None:
        ours = wrapped(model)
        ours.create_or_update_model_card = lambda _: (  # type: ignore[method-assign, assignment]  # on this model alone
            None
        )  # ours is written by worker/training/export.py; peft would fill a template each time
        ours.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)

    def load(self, model: torch.nn.Module, folder: Path) -> torch.nn.Module:
        from peft import PeftModel

        return PeftModel.from_pretrained(transformer(model), str(folder), is_trainable=False)

    def load_blended(self, model: torch.nn.Module, folder: Path, share: float) -> torch.nn.Module:
        if not self.blends:
            return super().load_blended(model, folder, share)
        loaded = self.load(model, folder)
        for name, weight in loaded.named_parameters():
            if any(part in name for part in self.scaled):
                weight.data = self.neutral + share * (weight.data - self.neutral)
        return loaded

    def loading(self, *, task: str = "generation") -> Loading:
        return Loading(
            ("from peft import PeftModel",), "model = PeftModel.from_pretrained(model, folder)", "model = model.merge_and_unload()"
        )

    def merge(self, model: torch.nn.Module) -> torch.nn.Module:
        if not self.merges:
            return super().merge(model)
        merged: torch.nn.Module = wrapped(model).merge_and_unload()
        return merged
