"""PiSSA: LoRA initialized with each weight's largest singular directions instead of noise and zero."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from app.languages import gettext, mark
from app.shapes import Shape
from app.strategies._advice import LORA_VARIANT
from app.strategies._base import Kept, Memory
from app.strategies._files import write_adapter
from app.strategies._low_rank import InOnePass, LowRank
from app.strategies._model import wrapped

if TYPE_CHECKING:
    import torch


class Pissa(InOnePass, LowRank):
    """The correction s B A, s = alpha / rank, starts not at zero but as the top singular part of the base weight W, s B₀ A₀. That
    part is subtracted in the forward pass, W x + s (B A − B₀ A₀) x, so that the model starts as its base and W is never written
    to.

    What is saved is an ordinary LoRA of twice the rank for the unchanged base, A' = [A − A₀; A₀], B' = [B, B − B₀], so the result
    loads anywhere and shares the base with its siblings.
    """

    name: Literal["pissa"] = "pissa"
    title: ClassVar = "PiSSA"
    summary: ClassVar = mark("LoRA initialized from the principal singular vectors of each weight.")
    when_to_use: ClassVar = mark("When there are few steps: it converges faster than LoRA, and takes longer to initialize.")
    paper: ClassVar = (
        "Meng et al. 2024, PiSSA: Principal Singular Values and Singular Vectors Adaptation",
        "https://arxiv.org/abs/2404.02948",
    )
    place: ClassVar = 13
    plain_lora: ClassVar = True
    standing: ClassVar = LORA_VARIANT
    default_learning_rate: ClassVar = 1e-4

    def unavailable(self, shape: Shape, *, task: str = "generation", cuda: bool = False) -> str | None:
        chosen = set(self.targets(shape))
        narrowest = min(min(x.inputs, x.outputs) for x in shape.linears() if x.name in chosen)
        if self.rank > narrowest:
            return gettext(
                "A rank of %(rank)s is more than the model's narrowest layer has directions. Choose %(most)s or less.",
                rank=self.rank,
                most=narrowest,
            )
        return super().unavailable(shape, task=task, cuda=cuda)

    def memory(self, shape: Shape, *, weight_bytes: int = 4, optimizer_bytes: int = 8) -> Memory:
        plain = super().memory(shape, weight_bytes=weight_bytes, optimizer_bytes=optimizer_bytes)
        return plain._replace(weights=plain.weights + 4 * self.trainable(shape))  # A₀ and B₀

    def activation_counts(self, shape: Shape) -> Kept:
        if not self.joins():
            return super().activation_counts(shape)
        # The output of A' per token, and A' and B' themselves.
        wide = shape.layer_inputs() + 2 * self.rank * len(self.targets(shape))
        return Kept(wide, 2 * self.trainable(shape) // shape.layers)

    def attach(self, model: torch.nn.Module, *, task: str = "generation", labels: int = 0) -> torch.nn.Module:
        attached = super().attach(model, task=task, labels=labels)
        for _, layer in _layers(attached):
            weight = layer.get_base_layer().weight
            whole = weight.data
            # Sixteen iterations of the randomized SVD (Halko et al. 2011) come within float error of the exact one.
            layer.pissa_init("default", "pissa_niter_16")
            weight.data = whole  # peft has put W − s B₀ A₀ in its place, rounded to W's dtype
            for name, matrix in (("first_down", layer.lora_A), ("first_up", layer.lora_B)):
                layer.register_buffer(name, matrix["default"].weight.detach().clone(), persistent=False)
            layer.takes_first_off = layer.register_forward_hook(_take_first_off)  # for peft's own forward
        return attached

    def save(self, model: torch.nn.Module, folder: Path) -> None:
        plain = {}
        for name, layer in _layers(model):
            plain[f"{name}.lora_A.weight"], plain[f"{name}.lora_B.weight"] = whole_correction(layer)
        config = wrapped(model).peft_config["default"].to_dict() | {
            "r": 2 * self.rank,
            "lora_alpha": 2 * self.alpha,
            "inference_mode": True,
        }
        write_adapter(folder, config, plain)

    def extra_state(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """A₀ and B₀: on another machine, or after other random numbers, they would differ a little."""
        return {f"{name}.{part}": getattr(layer, part) for name, layer in _layers(model) for part in ("first_down", "first_up")}

    def restore(self, model: torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
        own = self.extra_state(model)
        for name, value in state.items():
            own[name].copy_(value)


def _layers(model: torch.nn.Module) -> list[tuple[str, Any]]:
    """The model's LoRA layers with their names."""
    from peft.tuners.lora import LoraLayer

    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]


def whole_correction(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """A' (2r, K) and B' (N, 2r) with B' A' = B A − B₀ A₀, for a layer with A (r, K) and B (N, r).

    The sum is B (A − A₀) + (B − B₀) A₀: the trained change is separate, so that bf16 rounds it relative to itself and not to the
    far larger B₀ A₀.
    """
    import torch

    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return torch.cat([down - layer.first_down, layer.first_down]), torch.cat([up, up - layer.first_up], 1)


def _take_first_off(layer: Any, given: tuple[torch.Tensor], out: torch.Tensor) -> torch.Tensor:
    """x (…, K) and out = W x + s B A x, (…, N), to out − s B₀ A₀ x; dropout applies to the trained part only."""
    from torch.nn.functional import linear

    if layer.disable_adapters:
        return out
    first = linear(linear(given[0].to(layer.first_down.dtype), layer.first_down), layer.first_up)
    less: torch.Tensor = out - layer.scaling["default"] * first
    return less.to(out.dtype)
