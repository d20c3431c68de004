"""AdaLoRA: the rank is distributed over the layers by importance while training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from pydantic import Field

from app.languages import gettext, mark
from app.shapes import Shape, shape_of
from app.strategies._base import Kept, Memory
from app.strategies._low_rank import InOnePass, LowRank, peft_targets
from app.strategies._model import transformer, wrapped

if TYPE_CHECKING:
    import torch
    from peft import AdaLoraConfig, AdaLoraModel


class AdaLora(InOnePass, LowRank):
    name: Literal["adalora"] = "adalora"
    title: ClassVar = "AdaLoRA"
    summary: ClassVar = mark("LoRA that allocates its rank to the layers that need it.")
    when_to_use: ClassVar = mark("For longer runs with a tight size limit. It needs a few hundred steps to find out where rank is needed.")
    paper: ClassVar = (
        "Zhang et al. 2023, AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning",
        "https://arxiv.org/abs/2303.10512",
    )
    place: ClassVar = 14
    arithmetic: ClassVar = 2
    default_learning_rate: ClassVar = 1e-3
    scaled: ClassVar = (".lora_E.",)

    rank: int = Field(8, ge=1, le=512, description=mark("Mean rank at the end."), json_schema_extra={"basic": True})
    start_rank: int | None = Field(None, ge=1, le=1024, description=mark("Initial rank of every layer. Leave empty for 1.5 × the rank."))
    orthogonality: float = Field(0.5, ge=0, le=10, description=mark("Weight of the orthogonality regularization."))

    def first_rank(self) -> int:
        return self.start_rank or -(-3 * self.rank // 2)

    def trainable(self, shape: Shape) -> int:
        chosen = set(self.targets(shape))
        r = self.first_rank()
        return sum(r * (x.inputs + x.outputs) + r for x in shape.each_linear() if x.name in chosen)

    def memory(self, shape: Shape, *, weight_bytes: int = 4, optimizer_bytes: int = 8) -> Memory:
        """In addition to what any strategy holds, peft's allocator keeps three values for each trained one: its importance, the
        moving average of that, and its uncertainty (the paper's equations 8 to 10)."""
        plain = super().memory(shape, weight_bytes=weight_bytes, optimizer_bytes=optimizer_bytes)
        return plain._replace(optimizer=plain.optimizer + 12 * self.trainable(shape))

    def activation_counts(self, shape: Shape) -> Kept:
        chosen = [x for x in shape.linears() if x.name in set(self.targets(shape))]
        made = self.first_rank() * sum(x.inputs for x in chosen) if self.joins() else 0  # A with its singular values
        return Kept(shape.layer_inputs() + self.first_rank() * len(chosen), made)

    def unavailable(self, shape: Shape, *, task: str = "generation", cuda: bool = False) -> str | None:
        if self.first_rank() < self.rank:
            return gettext("The rank at the start is smaller than the rank in the end. Raise start_rank or leave it empty.")
        return super().unavailable(shape, task=task, cuda=cuda)

    def config(self, model: torch.nn.Module, *, task: str) -> Any:
        from peft import AdaLoraConfig

        return AdaLoraConfig(
            task_type=self.task_type(task),
            target_r=self.rank,
            init_r=self.first_rank(),
            lora_alpha=self.alpha,  # type: ignore[arg-type]  # peft divides by the rank, and takes any number
            lora_dropout=self.dropout,
            target_modules=peft_targets(shape_of(transformer(model).config.to_dict()), self.layers),
            orth_reg_weight=self.orthogonality,
            total_step=1_000_000,  # `begin` sets the real number
            inference_mode=False,
        )

    def attach(self, model: torch.nn.Module, *, task: str = "generation", labels: int = 0) -> torch.nn.Module:
        attached = super().attach(model, task=task, labels=labels)
        for name, parameter in attached.named_parameters():
            if ".ranknum." in name:  # next to bf16 weights peft recreates the count of directions, as a trainable parameter
                parameter.requires_grad_(False)
        return attached

    def begin(self, model: torch.nn.Module, total_steps: int) -> None:
        config = _config(model)
        config.total_step = max(total_steps, 2)  # ranks are decided after at least one step has measured the importance
        config.tinit = total_steps // 10
        config.tfinal = total_steps // 5
        config.deltaT = max(total_steps // 50, 1)

    def regulariser(self, model: torch.nn.Module) -> torch.Tensor | None:
        """Mean over the corrections of ‖AAᵀ − I‖ and ‖BᵀB − I‖ (the paper's equation 4), times the setting's weight."""
        import torch

        terms = []
        for name, p in model.named_parameters():
            if ".lora_A." in name or ".lora_B." in name:
                gram = p @ p.T if ".lora_A." in name else p.T @ p
                terms.append(torch.linalg.matrix_norm(gram - torch.eye(gram.shape[0], device=gram.device, dtype=gram.dtype)))
        return self.orthogonality * torch.stack(terms).mean()

    def after_step(self, model: torch.nn.Module, step: int) -> None:
        import torch

        for parameter in model.parameters():
            if parameter.requires_grad and parameter.grad is None:  # of an expert to which no token went; peft multiplies by it
                parameter.grad = torch.zeros_like(parameter)
        _tuner(model).update_and_allocate(step)

    def extra_state(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        import torch

        allocator = _tuner(model).rankallocator
        state: dict[str, torch.Tensor] = {}
        for kind in ("ipt", "exp_avg_ipt", "exp_avg_unc"):
            state |= {f"{kind}:{name}": value for name, value in getattr(allocator, kind).items()}
        pattern = _config(model).rank_pattern or {}
        return state | {f"rank:{name}": torch.tensor(kept, dtype=torch.uint8) for name, kept in pattern.items()}

    def restore(self, model: torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
        allocator = _tuner(model).rankallocator
        pattern: dict[str, list[bool]] = {}
        for key, value in state.items():
            kind, _, name = key.partition(":")
            if kind == "rank":
                pattern[name] = value.bool().tolist()
            else:
                getattr(allocator, kind)[name] = value
        _config(model).rank_pattern = pattern or None


def _config(model: torch.nn.Module) -> AdaLoraConfig:
    return cast("AdaLoraConfig", wrapped(model).peft_config["default"])


def _tuner(model: torch.nn.Module) -> AdaLoraModel:
    return cast("AdaLoraModel", wrapped(model).base_model)
