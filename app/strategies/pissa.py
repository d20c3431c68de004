"""PiSSA: LoRA that starts from each weight's largest singular directions instead of from noise and zero."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from app.shapes import Shape
from app.strategies._files import write_adapter
from app.strategies._low_rank import LowRank

if TYPE_CHECKING:
    import torch


class Pissa(LowRank):
    """The base weight W is split into its top singular part, which learns, and the rest, which is frozen.

    What is saved is an ordinary LoRA of twice the rank against the untouched base, A' = [A; A₀], B' = [B, −B₀], so the
    result loads anywhere and shares the base with its siblings.
    """

    name: Literal["pissa"] = "pissa"
    title: ClassVar = "PiSSA"
    summary: ClassVar = "LoRA that starts from the most important directions of each weight."
    when_to_use: ClassVar = "When few steps must do much: it converges faster than LoRA, and its start takes longer."
    paper: ClassVar = (
        "Meng et al. 2024, PiSSA: Principal Singular Values and Singular Vectors Adaptation",
        "https://arxiv.org/abs/2404.02948",
    )
    place: ClassVar = 13
    default_learning_rate: ClassVar = 1e-4

    def unavailable(self, shape: Shape, *, task: str = "generation", cuda: bool = False) -> str | None:
        chosen = set(self.targets(shape))
        narrowest = min(min(x.inputs, x.outputs) for x in shape.linears() if x.name in chosen)
        if self.rank > narrowest:
            return f"A rank of {self.rank} is more than the model's narrowest layer has directions. Choose {narrowest} or less."
        return super().unavailable(shape, task=task, cuda=cuda)

    def variant(self) -> dict[str, Any]:
        # Sixteen rounds of the randomised decomposition (Halko et al. 2011) come within float error of the exact one.
        return {"init_lora_weights": "pissa_niter_16"}

    def attach(self, model: torch.nn.Module, *, task: str = "generation", labels: int = 0) -> torch.nn.Module:
        attached = super().attach(model, task=task, labels=labels)
        start = {name: p.detach().clone() for name, p in attached.named_parameters() if ".lora_" in name}
        object.__setattr__(attached, "pissa_start", start)  # A₀ and B₀, no part of what learns or is counted
        return attached

    def save(self, model: torch.nn.Module, folder: Path) -> None:
        import torch
        from peft import get_peft_model_state_dict

        learnt = get_peft_model_state_dict(model, save_embedding_layers=False)
        start = {name.replace(".default.", "."): p for name, p in model.pissa_start.items()}
        plain = {}
        for name, value in learnt.items():
            first = start[name].to(value)
            rows = "lora_A" in name  # A grows downwards, B sideways
            plain[name] = torch.cat([value, first if rows else -first], dim=0 if rows else 1)
        config = model.peft_config["default"].to_dict() | {
            "r": 2 * self.rank,
            "lora_alpha": 2 * self.alpha,
            "init_lora_weights": True,
            "inference_mode": True,
        }
        write_adapter(folder, config, plain)

    def joins(self) -> bool:
        return not self.dropout  # with dropout, the layers are peft's own

    def learns_in_bf16(self) -> bool:
        return self.joins()
