"""Full tuning spread over the processes of a job: each keeps its rows of the blocks' weights, gradients and optimizer state.

FSDP2 (`torch.distributed.fsdp.fully_shard`) gathers a block's weights when it runs and scatters its gradients after; embedding,
last norm and head stay whole in each process. So 16 bytes a weight become 16 / processes, and a block's weights besides.

The optimizer is given plain tensors: this process's rows. Now and then the weights are put together again in the first process,
tensor by tensor, to be scored and saved as if it had trained alone. The optimizer's state, twice their size, never is: each process
writes its rows of it into the checkpoint, and reads those that are its own when the job goes on, with whatever number of processes.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from app.strategies._model import backbone
from worker.modeling import fused_layers
from worker.runtime.device import Compute
from worker.runtime.distributed import ProcessGroup
from worker.runtime.failures import disk_is_full
from worker.training import checkpoint, optim
from worker.training.backends._base import PlainBackend
from worker.training.objectives._base import TrainingObjective, body_of, trained_parameters


class Shards:
    """The spread form of a job's model. Made in every process at once, with the same weights in each."""

    def __init__(self, model: nn.Module, engine: Compute, world: ProcessGroup) -> None:
        self.world, self.model = world, model
        # The model without its weights, which the whole one is made of again.
        self.skeleton = copy.deepcopy(model, {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()})
        mesh = init_device_mesh(engine.device.type, (world.size,))
        # Weights are gathered in the type of the products, half as many bytes in bf16, and gradients summed in float32.
        half = engine.compute if engine.compute != torch.float32 else None
        types = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=half and torch.float32, cast_forward_inputs=False)
        stack = backbone(body_of(model))
        for block in fused_layers.blocks_of(stack):
            fully_shard(block, mesh=mesh, mp_policy=types, reshard_after_forward=True)
            sharded = cast("FSDPModule", block)
            sharded.set_gradient_divide_factor(1.0)  # gradients are summed: the loss was divided by all that is learnt
            sharded.set_force_sum_reduction_for_comms(True)
        # The blocks' common root, with no weights of its own: without one each block is a root, which keeps its weights gathered after
        # its forward pass, and gathers none ahead while another computes.
        rest = {p for p in stack.parameters() if not isinstance(p, DTensor)}
        fully_shard(stack, mesh=mesh, ignored_params=rest)
        self.spread = trained_parameters(model)
        self.rows = {name: nn.Parameter(p.to_local().detach()) if isinstance(p, DTensor) else p for name, p in self.spread.items()}

    def collect(self) -> None:
        """Give each process's rows their gradients, summed over all processes."""
        whole = []
        for name, p in self.spread.items():
            if isinstance(p, DTensor):
                self.rows[name].grad = torch.zeros_like(self.rows[name]) if p.grad is None else cast("DTensor", p.grad).to_local()
                p.grad = None
            else:
                whole.append(p)
        self.world.sum_gradients(whole)

    def length(self) -> torch.Tensor:
        """The length of the whole gradient, the same in every process."""
        own = [self.rows[name].grad for name, p in self.spread.items() if isinstance(p, DTensor)]
        squares = torch.nn.utils.get_total_norm([g for g in own if g is not None and g.numel()]).float().square()
        self.world.sum_([squares])
        shared = [p.grad for p in self.spread.values() if not isinstance(p, DTensor) and p.grad is not None]
        return (squares + torch.nn.utils.get_total_norm(shared).float().square()).sqrt()

    def read_states(self, saved: Path) -> dict[str, torch.Tensor]:
        """This process's rows of a checkpoint's optimizer state, `<moment>/<parameter>`."""
        if not optim.has_scales(checkpoint.names(saved / checkpoint.TRAINER)):
            return checkpoint.read_optimizer(saved, rows=self._own)
        whole = optim.widened(checkpoint.read_optimizer(saved))  # the scales of one process's 8-bit moments do not go by rows
        return {key: tensor[self._own(key, len(tensor))] if tensor.ndim else tensor for key, tensor in whole.items()}

    def _own(self, key: str, count: int) -> slice:
        """Which of the `count` rows of a parameter's moment are this process's."""
        if not self._is_shared_out(key):
            return slice(0, count)
        each = -(-count // self.world.size)  # as FSDP cuts: the first rows to the first process, the last may go without
        return slice(min(self.world.rank * each, count), min((self.world.rank + 1) * each, count))

    def _is_shared_out(self, key: str) -> bool:
        return isinstance(self.spread[key.partition("/")[2]], DTensor)

    def write_states(self, optimizer: torch.optim.Optimizer, path: Path) -> None:
        """Write this process's rows of the optimizer's state; what all processes have whole is written by the first."""
        states = optim.state_tensors(optimizer, self.rows, plain=True)
        checkpoint.write_piece(path, {key: x for key, x in states.items() if self.world.first or (x.ndim and self._is_shared_out(key))})

    @torch.no_grad()
    def whole_model(self) -> nn.Module | None:
        """A plain model with all weights, in the first process; None in the others. All call it."""
        weights = {}
        for name, p in self.model.named_parameters():
            full = p.full_tensor() if isinstance(p, DTensor) else p.detach()
            if self.world.first:
                weights[name] = full
        if not self.world.first:
            return None
        memo = {id(p): nn.Parameter(weights[name], p.requires_grad) for name, p in self.skeleton.named_parameters()}
        return copy.deepcopy(self.skeleton, memo).train(self.model.training)


class FsdpBackend(PlainBackend):
    """Full tuning spread over the processes of a job. The model is whole until `start`, and again in the first process while `gathered`
    and after `close`; in between `trained` are this process's rows."""

    name = "fsdp"
    shards: Shards
    saved: Path | None
    pieces: list[Path] | None = None  # what each process wrote of the optimizer's state

    def prepare(
        self, lesson: TrainingObjective, model: torch.nn.Module, optimizer: torch.optim.Optimizer, parts: int, saved: Path | None = None
    ) -> dict[str, Any]:
        self.saved = saved  # its optimizer's state is read when the rows are known
        return super().prepare(lesson, model, optimizer, parts)

    def start(self, world: ProcessGroup) -> None:
        super().start(world)
        self.shards = Shards(self.model, self.engine, world)
        self.trained = self.shards.rows
        self.optimizer = optim.optimizer_of(self.trained, self.lesson.spec)
        if self.saved:
            optim.load_state(self.optimizer, self.trained, self.shards.read_states(self.saved))

    def sum_gradients(self) -> None:
        self.shards.collect()

    def grad_norm(self) -> torch.Tensor:
        self.norm = self.shards.length()
        return self.norm

    @contextlib.contextmanager
    def gathered(self, folder: Path) -> Iterator[None]:
        """The weights are put together in the first process, and the optimizer's state is written to files, `pieces`. Raises OSError in
        all processes where one could not write its own."""
        spread = self.model, self.trained
        aside, world = folder / ".optimizer.tmp", self.world
        pieces = [checkpoint.piece_of(aside, place, world.size) for place in range(world.size)]
        failed = None
        try:
            self.shards.write_states(self.optimizer, pieces[world.rank])
        except Exception as error:
            failed = error
        code = world.maximum(errno.ENOSPC if failed and disk_is_full(failed) else errno.EIO if failed else 0)
        if failed:
            raise failed
        if code:
            raise OSError(code, os.strerror(code), str(aside))
        world.bring_files(pieces)
        self.pieces = pieces
        self._join()
        try:
            yield
        finally:
            self.model, self.trained = spread
            self.pieces = None

    def optimizer_state(self) -> dict[str, torch.Tensor] | list[Path]:
        return self.pieces or super().optimizer_state()

    def close(self) -> None:
        self._join()
        del self.shards
        super().close()

    def _join(self) -> None:
        """Put the model together again in the first process. Every process calls it."""
        model = self.shards.whole_model()
        if model is not None:
            self.model, self.trained = model, trained_parameters(model)
