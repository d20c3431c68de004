"""Steps on a CPU: the parts of a pack in threads, weights that are trained whole rounded once a step, LoRA's gradients past autograd,
and AdamW in one pass with the clipping, where gradients are kept by part.

Sums have a fixed order (`worker/runtime/thread_parallel.py`), so a step is reproducible to the bit. The kernels are those of
`worker/kernels/cpu/`: `full_tuning.py` and `gradient_buffers.py` for whole weights, `lora_step.py` for LoRA.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from worker.kernels.cpu import full_tuning, gradient_buffers
from worker.kernels.cpu.gradient_buffers import MasterWeight
from worker.kernels.cpu.lora_step import LoraOptimizer
from worker.runtime.device import Compute
from worker.training import optim
from worker.training.backends._base import PlainBackend
from worker.training.objectives._base import LossOutput, TrainingObjective, body_of


class CpuPaths(NamedTuple):
    """Which of the fast paths a job may take, as far as its strategy, its settings and the CPU decide; the model decides the rest."""

    own_gradients: bool = False  # parts have gradients of their own, added afterwards: an adapter's are small
    master_weights: bool = False  # whole weights are kept in float32 and rounded once a step
    gradient_buffers: bool = False  # their gradients are kept by part, in bf16, until AdamW adds them
    lora_step: bool = False  # LoRA's gradients and AdamW outside of torch


class ThreadedCpuBackend(PlainBackend):
    name = "threaded_cpu"
    in_parts = True

    def __init__(self, engine: Compute, paths: CpuPaths) -> None:
        super().__init__(engine)
        self.paths = paths
        self.wholes: list[MasterWeight] = []
        self.kept: list[list[gradient_buffers.RowRange]] = []  # gradients of this step that torch's optimizer does not see, by thread
        self.factors: LoraOptimizer | None = None
        self.hooks = contextlib.ExitStack()

    def prepare(
        self, lesson: TrainingObjective, model: torch.nn.Module, optimizer: torch.optim.Optimizer, parts: int, saved: Path | None = None
    ) -> dict[str, Any]:
        facts = super().prepare(lesson, model, optimizer, parts, saved)
        self.apart = parts > 1 and self.paths.own_gradients
        if self.paths.master_weights:
            self.wholes = full_tuning.patch_full_tuning(body_of(model), self.engine)
        if self.wholes:
            apart = self.paths.gradient_buffers and gradient_buffers.keep(self.wholes, parts)
            facts["whole"] = "apart" if apart else True
        for whole in self.wholes:
            if whole.multiplies:
                whole.rounded()  # here and not by a part's thread, whose memory is its own
        if self.paths.lora_step and hasattr(body_of(model), "peft_config"):
            from worker.modeling import fused_lora  # peft takes a while to import

            self.factors = fused_lora.keep(body_of(model), parts, self.engine, optimizer)
        if parts > 1 and not self.apart:
            self.hooks.enter_context(self.engine.abreast.in_order(self.trained.values()))
        return facts

    def passes(self, pack: Sequence[Any], learnt: int) -> list[LossOutput]:
        found = self.engine.abreast.map(functools.partial(self._pass, learnt), pack)
        for _, gradients in found:
            self._add(gradients)
        full_tuning.add_parts(self.wholes)
        return [output for output, _ in found]

    def _pass(self, learnt: int, part: Any) -> tuple[LossOutput, Sequence[torch.Tensor | None]]:
        """One part of a pack forwards and backwards: its share of the step's loss, and where parts are `apart` its gradients."""
        output = self.lesson.loss(self.model, part, self.engine)
        loss = output.loss / learnt
        gradients: Sequence[torch.Tensor | None] = ()
        if self.apart:
            gradients = torch.autograd.grad(loss, list(self.trained.values()), allow_unused=True)
        else:
            loss.backward()
        return output._replace(loss=loss.detach()), gradients

    def _add(self, gradients: Sequence[torch.Tensor | None]) -> None:
        """Add a part's gradients to those of the parts before it."""
        pairs = [(p, g) for p, g in zip(self.trained.values(), gradients, strict=False) if g is not None]
        first, later = ([(p, g) for p, g in pairs if (p.grad is None) == new] for new in (True, False))
        for parameter, _ in first:
            parameter.grad = torch.empty_like(parameter)  # the fused optimizer takes both to lie alike in memory
        if first:
            torch._foreach_copy_([p.grad for p, _ in first if p.grad is not None], [g for _, g in first])
        if later:
            torch._foreach_add_([p.grad for p, _ in later if p.grad is not None], [g for _, g in later])

    def add_loss(self, extra: torch.Tensor) -> None:
        super().add_loss(extra)
        full_tuning.add_parts(self.wholes)

    def grad_norm(self) -> torch.Tensor:
        abreast = self.engine.abreast
        self.kept = gradient_buffers.shares(self.wholes, abreast.threads)
        of_factors = self.factors.squares() if self.factors else 0.0
        squares = gradient_buffers.squares(self.kept, abreast) + of_factors
        norm = super().grad_norm()
        if squares:
            self.norm = norm.square().add(squares).sqrt()
        return self.norm

    def step(self, learning_rate: float, max_norm: float) -> None:
        super().step(learning_rate, max_norm)
        if self.wholes:
            full_tuning.move(self.wholes, self.engine.abreast)
        if math.isfinite(self.norm + self.loss):
            shorten = optim.clip_coefficient(self.norm, max_norm)
            if self.wholes:
                gradient_buffers.move(self.kept, self.engine.abreast, self.optimizer, shorten)
            if self.factors:
                self.factors.move(shorten)
        self.kept = []
        gradient_buffers.leave(self.wholes)

    def close(self) -> None:
        self.hooks.close()
        if self.factors:
            self.factors.release()
            self.factors = None
        full_tuning.release_memory(self.wholes)
        self.wholes = []
        super().close()
