"""A CUDA graph without a GPU: the operations of a step on a tape, which is replayed on the same tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Tape:
    """What was computed once is computed again by `replay`, from what its tensors hold then. Nothing else of the step takes part."""

    def __init__(self, run: Any) -> None:
        self.done: list[tuple[Any, Any, Any, Any]] = []
        tape = self

        class Record(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                out = func(*args, **(kwargs or {}))
                tape.done.append((func, args, kwargs or {}, out))
                return out

        with Record():
            self.out = run()
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, out in self.done:
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)
