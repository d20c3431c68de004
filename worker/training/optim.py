"""The optimizer, the learning rate over time, and clipping; the state in plain tensors so that it can be saved without pickle."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from app.errors import DoesNotFit
from app.optimizers import OPTIMIZERS
from app.run_settings import RunSettings
from app.spec import JobSpec
from worker.runtime import devices
from worker.training.optimizers import MAKERS

Named = dict[str, torch.nn.Parameter]


def trained_parameters(model: torch.nn.Module) -> Named:
    """What learns, by name. Raises DoesNotFit when nothing does."""
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not found:
        raise DoesNotFit("The method leaves no trainable parameters in this model.", hint="Choose another method or other layers.")
    return found


CYCLES, DECAY_FRACTION = 2, 0.1
"""Of the schedules cosine_with_restarts and wsd, where nobody says otherwise."""
HEAD = "classifier_head."
HEAD_RATE = 10.0
"""A new head on a tuned model starts from noise, so it learns faster than what was trained before (discriminative learning
rates, Howard and Ruder 2018, ULMFiT, section 3.2)."""


TABLES_OF_WORDS = re.compile(r"embed|lm_head|\brows$")
"""Names of matrices whose rows stand for tokens each, which Muon is not for."""


def make_optimizer(
    parameters: Named,
    learning_rate: float,
    weight_decay: float,
    kind: str = "adamw",
    *,
    betas: tuple[float | None, float | None] = (None, None),
    eps: float | None = None,
    faster: Callable[[str], float] = lambda name: 1.0,
) -> torch.optim.Optimizer:
    """The optimizer of that name. Only matrices decay: pulling biases and norms to zero helps nothing. Betas and eps are the kind's own
    where they are None, and `faster` says how many times the learning rate a parameter learns at."""
    mixed = len({name.startswith(HEAD) for name in parameters}) == 2
    groups: dict[tuple[bool, bool, bool, float], dict[str, Any]] = {}
    for name, p in parameters.items():
        head, matrix = name.startswith(HEAD), p.ndim >= 2
        muon = kind == "muon" and p.ndim == 2 and not head and not TABLES_OF_WORDS.search(name)
        scale = HEAD_RATE if head and mixed else faster(name)
        group = groups.setdefault((head, not matrix, muon, scale), {"params": [], "weight_decay": weight_decay if matrix else 0.0})
        group |= {"scale": scale, "muon": muon}
        group["params"].append(p)
    own = OPTIMIZERS[kind]
    first, second = (None, None) if own.betas is None else own.betas
    given = (first if betas[0] is None else betas[0], second if betas[1] is None else betas[1])
    return MAKERS[kind]([groups[key] for key in sorted(groups)], learning_rate, given, own.eps if eps is None else eps)


def optimizer_of(parameters: Named, spec: JobSpec) -> torch.optim.Optimizer:
    """The optimizer that an order asks for."""
    run, faster = spec.run, spec.strategy.rate_scale
    betas = run.adam_beta1, run.adam_beta2
    return make_optimizer(parameters, spec.learning_rate, run.weight_decay, run.optimizer, betas=betas, eps=run.adam_epsilon, faster=faster)


def learning_rate_at(step: int, total: int, peak: float, run: RunSettings) -> float:
    """The learning rate of optimizer step `step` (1 to `total`): a linear rise, then the schedule down to its floor, which without one
    is never quite zero."""
    warmup = run.warmup_steps if run.warmup_steps is not None else math.ceil(run.warmup_fraction * total)
    if step <= warmup:
        return peak * step / warmup
    share = _share(step - warmup - 1, max(1, total - warmup), total, run)
    return peak * (run.min_lr_fraction + (1 - run.min_lr_fraction) * share) if run.min_lr_fraction else peak * share


def _share(done: int, after: int, total: int, run: RunSettings) -> float:
    """What the schedule leaves of the rate when `done` of `after` steps behind the warmup are through, 1 to 0."""
    if run.schedule == "constant":
        return 1.0
    if run.schedule == "linear":
        return 1 - done / after
    if run.schedule == "wsd":
        falling = min(after, max(1, math.ceil((run.decay_fraction or DECAY_FRACTION) * total)))
        return min(1.0, (after - done) / falling)
    if run.schedule == "cosine_with_restarts":
        cycles = run.num_cycles or CYCLES
        return 0.5 * (1 + math.cos(math.pi * (done * cycles % after / after)))
    return 0.5 * (1 + math.cos(math.pi * (done / after)))


def set_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = value * group["scale"]


def grad_norm(parameters: Named) -> torch.Tensor:
    """The norm of the whole gradient, a scalar. Makes no device wait."""
    return torch.nn.utils.get_total_norm([p.grad for p in parameters.values() if p.grad is not None])


def clip_grad_(parameters: Named, max_norm: float, norm: torch.Tensor) -> None:
    """Clip a gradient of this norm to `max_norm` (0: not at all). One that is not finite is left alone; `optimizer_step` keeps it from
    the weights."""
    if max_norm > 0:
        torch.nn.utils.clip_grads_with_norm_(parameters.values(), max_norm, norm)


def clip_coefficient(norm: torch.Tensor, max_norm: float) -> float:
    """What `clip_grad_` multiplies a gradient of this norm by."""
    return min(1.0, max_norm / (float(norm) + 1e-6)) if max_norm > 0 else 1.0


def clip_grad_norm(parameters: Named, max_norm: float) -> torch.Tensor:
    """The norm of the whole gradient, before it is clipped to `max_norm`."""
    norm = grad_norm(parameters)
    clip_grad_(parameters, max_norm, norm)
    return norm


MIN_TO_SHARE = 2**17
"""Numbers of a tensor, in the mean, from which threads move its weights together. To wake a second thread for each of the 390 matrices of an
adapter took 32 ms a step, one thread needs 5."""


def optimizer_step(optimizer: torch.optim.Optimizer, norm: torch.Tensor) -> None:
    """One step, or none: where the gradient's length is not finite, weights, moments and the count of steps stay as they are.

    torch's fused kernel decides that on the device. bitsandbytes' has no such switch, so the host looks at the length first; it
    waits for the device after every tensor of a step in any case.
    """
    if optimizer.defaults.get("fused"):
        optimizer.grad_scale = None  # type: ignore[attr-defined]  # both are read where it is fused
        optimizer.found_inf = (~torch.isfinite(norm)).to(torch.float32)  # type: ignore[attr-defined]
    elif not math.isfinite(norm):
        return
    sizes = [p.numel() for group in optimizer.param_groups for p in group["params"]]
    with _one_thread() if sum(sizes) < MIN_TO_SHARE * len(sizes) else contextlib.nullcontext():
        optimizer.step()


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


# Saved and put back ---------------------------------------------------------------------------------------------------

BLOCK = 256
"""Numbers that share a scale in bitsandbytes' 8-bit moments."""
TABLES = {"state1": "qmap1", "state2": "qmap2"}
SCALES = {"state1": "absmax1", "state2": "absmax2"}
"""8-bit moments, the table of the values that the 8 bits stand for (the same for every tensor, so never saved), and the scales."""


def state_tensors(optimizer: torch.optim.Optimizer, parameters: Named, plain: bool = False) -> dict[str, torch.Tensor]:
    """The optimizer's state as `{"<moment>/<parameter>": tensor}`, each in its own type; a plain number is a tensor of no axes.

    With `plain`, 8-bit moments are given in float32 without their scales, so that they can be cut and joined row by row.
    """
    found = {}
    for name, parameter in parameters.items():
        state = optimizer.state.get(parameter, {})
        for key, value in state.items():
            if key in TABLES.values() or (plain and key in SCALES.values()):
                continue
            if plain and key in TABLES and value.dtype == torch.uint8:
                value = _wide(value, state, key)
            found[f"{key}/{name}"] = value.detach().cpu().contiguous() if isinstance(value, torch.Tensor) else torch.tensor(value)
    return found


def has_scales(names: Iterable[str]) -> bool:
    """Whether there are 8-bit moments with their scales among tensors of these names."""
    return any(name.partition("/")[0] in SCALES.values() for name in names)


def widened(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What `state_tensors` gave, as it would have given it with `plain`."""
    from bitsandbytes.functional import create_dynamic_map

    found = {}
    for key, value in tensors.items():
        moment, _, name = key.partition("/")
        if moment in TABLES and value.dtype == torch.uint8:
            table = create_dynamic_map(signed=moment == "state1").to(value.device)  # the first is a mean, the second one of squares
            value = _wide(value, {TABLES[moment]: table, SCALES[moment]: tensors[f"{SCALES[moment]}/{name}"]}, moment)
        if moment not in SCALES.values():
            found[key] = value
    return found


def load_state(optimizer: torch.optim.Optimizer, parameters: Named, tensors: dict[str, torch.Tensor]) -> None:
    """Put back what `state_tensors` gave, each tensor in the type that the optimizer keeps it in."""
    by_name: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        moment, _, name = key.partition("/")
        by_name.setdefault(name, {})[moment] = value
    places = {id(p): (group, g, i) for g, group in enumerate(optimizer.param_groups) for i, p in enumerate(group["params"])}
    fused = bool(optimizer.defaults.get("fused"))
    for name, parameter in parameters.items():
        own = by_name.get(name, {})
        if own and hasattr(optimizer, "init_state"):
            group, g, i = places[id(parameter)]
            optimizer.init_state(group, parameter, g, i)  # bitsandbytes makes its tensors
            _fill(optimizer.state[parameter], own)
        elif own:
            optimizer.state[parameter] = {key: _placed(key, value, parameter, fused) for key, value in own.items()}


def _placed(key: str, value: torch.Tensor, parameter: torch.Tensor, fused: bool) -> Any:
    """A saved value where its optimizer keeps it. The count of steps is a whole number of Python's where it was one, and a tensor on
    the processor but for a fused kernel."""
    if key != "step":
        return value.to(parameter.device)
    if not value.is_floating_point():
        return int(value)
    return value.to(parameter.device) if fused and devices.is_gpu(parameter.device) else value.clone()


def _fill(state: dict, saved: dict[str, torch.Tensor]) -> None:
    """The saved values in a state that bitsandbytes has just made; a moment in float32 is rounded to 8 bits where it is kept so."""
    from bitsandbytes.functional import quantize_blockwise

    for key, value in saved.items():
        if key == "step":
            state[key] = int(value)
        elif key in TABLES and value.dtype != state[key].dtype:
            codes, made = quantize_blockwise(value.to(state[key].device), code=state[TABLES[key]], blocksize=BLOCK)
            state[key].copy_(codes)
            state[SCALES[key]].copy_(made.absmax)
        else:
            state[key].copy_(value)


def _wide(codes: torch.Tensor, state: dict, key: str) -> torch.Tensor:
    from bitsandbytes.functional import dequantize_blockwise

    return dequantize_blockwise(codes, absmax=state[SCALES[key]], code=state[TABLES[key]], blocksize=BLOCK)
