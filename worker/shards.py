"""Full tuning spread over the processes of a job: each keeps its rows of the blocks' weights, gradients and optimizer state.

FSDP2 (`torch.distributed.fsdp.fully_shard`) gathers a block's weights when it runs and scatters its gradients after; embedding,
last norm and head stay whole in each process. So 16 bytes a weight become 16 / processes, and a block's weights besides.

The optimizer is given plain tensors: this process's rows. Now and then everything is put together again in the first process,
tensor by tensor, to be scored and saved as if it had trained alone; so a checkpoint is resumed by any number of processes.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from worker import kernels, optim
from worker.lesson import body_of, trained_parameters
from worker.processes import World


class Shards:
    """The spread form of a job's model. Made in every process at once, with the same weights in each."""

    def __init__(self, model: nn.Module, device: torch.device, world: World) -> None:
        self.world, self.model = world, model
        # The model without its weights, which the whole one is made of again.
        self.skeleton = copy.deepcopy(model, {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()})
        mesh = init_device_mesh(device.type, (world.size,))
        for block in kernels.blocks_of(body_of(model)):
            fully_shard(block, mesh=mesh)
            block.set_gradient_divide_factor(1.0)  # gradients are summed: the loss was divided by all that is learnt
            block.set_force_sum_reduction_for_comms(True)
        self.spread = trained_parameters(model)
        self.rows = {name: nn.Parameter(p.to_local().detach()) if isinstance(p, DTensor) else p for name, p in self.spread.items()}

    def collect(self) -> None:
        """Give each process's rows their gradients, summed over all processes."""
        whole = []
        for name, p in self.spread.items():
            if isinstance(p, DTensor):
                self.rows[name].grad = torch.zeros_like(self.rows[name]) if p.grad is None else p.grad.to_local()
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

    def own_rows(self, states: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """This process's rows of whole optimizer tensors, named `<moment>/<parameter>`."""
        return {key: self._cut(key.partition("/")[2], tensor) for key, tensor in states.items()}

    def _cut(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        p = self.spread[name]
        if not isinstance(p, DTensor) or tensor.shape != p.shape:
            return tensor
        pieces = tensor.chunk(self.world.size)  # as FSDP cuts: the first rows to the first process, the last may go without
        return pieces[self.world.rank] if self.world.rank < len(pieces) else tensor[:0]

    def whole_states(self, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
        """The optimizer's state put together, in the first process; empty in the others. All call it."""
        found = {}
        for key, tensor in optim.state_tensors(optimizer, self.rows, plain=True).items():
            p = self.spread[key.partition("/")[2]]
            if isinstance(p, DTensor) and tensor.shape == self.rows[key.partition("/")[2]].shape and tensor.ndim:
                local = tensor.to(p.device)
                tensor = (
                    DTensor.from_local(local, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())
                    .full_tensor()
                    .cpu()
                )
            if self.world.first:
                found[key] = tensor
        return found

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


def spread(job: Any) -> Shards:
    """Spread a job over its processes. Its optimizer keeps what state it has."""
    states = optim.state_tensors(job.optimizer, job.trained, plain=True)
    shards = Shards(job.model, job.engine.device, job.world)
    run = job.spec.run
    job.trained = shards.rows
    job.optimizer = optim.make_optimizer(shards.rows, job.optimizer.param_groups[0]["lr"], run.weight_decay, run.optimizer)
    optim.load_state(job.optimizer, shards.rows, shards.own_rows(states))
    return shards


@contextlib.contextmanager
def whole(job: Any) -> Iterator[None]:
    """While inside, the first process holds the job as if it trained alone. Every process enters."""
    kept = job.model, job.trained
    job.states = job.shards.whole_states(job.optimizer)
    join(job)
    try:
        yield
    finally:
        job.model, job.trained = kept
        job.states = None
        dist.barrier(group=job.world.host)  # the others wait here, and not in the middle of a step


def join(job: Any) -> None:
    """Put the model together again in the first process. Every process calls it."""
    model = job.shards.whole_model()
    if model is not None:
        job.model, job.trained = model, trained_parameters(model)
