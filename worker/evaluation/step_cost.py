"""What a training step of a model without formulas costs: measured on the model itself when it is added, for `app/planning/`.

Everything is frozen and the embedding's output has a gradient, so that what autograd keeps is what any strategy keeps; what a strategy's own
layers keep in addition is arithmetic. Texts of three lengths give the part that grows with the tokens and the part that grows with their pairs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from app.shapes import MeasuredStep, Shape

LONGEST = 128
"""Tokens of the longest text, where the model reads as many. A quarter of it is a multiple of what packs are padded to."""


def measure(model: Any, shape: Shape, states: Callable[[Any, torch.Tensor], torch.Tensor]) -> MeasuredStep:
    """`states` gives the hidden states (T, H) of a text (T,), as the trainer reads it. The model is in float32 and evaluated, and is left so."""
    learning = [weight for weight in model.parameters() if weight.requires_grad]
    model.requires_grad_(False).train()  # dropout keeps its masks
    table = model.get_input_embeddings().weight  # an encoder–decoder has it in several layers
    layers = [module for module in model.modules() if isinstance(module, torch.nn.Embedding) and module.weight is table]
    hooks = [layer.register_forward_hook(lambda _, given, out: out.requires_grad_()) for layer in layers]
    try:
        short = max(1, min(LONGEST, shape.positions) // 4)
        texts = [torch.full((short * times,), min(4, shape.vocabulary - 1)) for times in (1, 2, 4)]
        kept = [_kept_bytes(model, states, text) for text in texts]
        seconds = [_seconds(model, states, texts[-1]) for _ in range(2)]
    finally:
        model.eval()
        for hook in hooks:
            hook.remove()
        for weight in learning:
            weight.requires_grad_(True)
    first, second = kept[1] - kept[0], kept[2] - kept[1]  # of a + b L + c L²
    pairs = max(0.0, (second - 2 * first) / (6 * short**2))
    return MeasuredStep(
        bytes_per_token=max(0.0, (first - 3 * pairs * short**2) / short),
        bytes_per_pair=pairs,
        operations_per_second=4 * shape.block_products() * len(texts[-1]) / min(seconds),
        threads=torch.get_num_threads(),
    )


def _kept_bytes(model: Any, states: Callable[[Any, torch.Tensor], torch.Tensor], text: torch.Tensor) -> int:
    """Bytes that autograd holds after a forward pass, each memory once, without the model's own."""
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    held: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = states(model, text)
    assert out.requires_grad
    return sum(storage.nbytes() for storage in held.values())


def _seconds(model: Any, states: Callable[[Any, torch.Tensor], torch.Tensor], text: torch.Tensor) -> float:
    began = time.perf_counter()
    states(model, text).sum().backward()
    return time.perf_counter() - began
