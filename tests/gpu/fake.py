"""A CUDA device that computes nothing, for a process of its own: fake tensors go through autograd, and every operation is watched.

`begin` comes before torch is imported, `as_cuda` after everything that looks for a real GPU when it is imported.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import sys
import types
import weakref
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CARD: dict[str, Any] = {"name": "A fake GPU", "memory": 80 * 2**30, "bf16": True, "capability": (9, 0)}
"""What the device says of itself; a case may say otherwise."""
BLOCK = 64  # numbers that share a scale in a 4-bit weight

VIEWS = frozenset(
    f"aten.{name}"
    for name in (
        "alias", "as_strided", "detach", "diagonal", "empty", "empty_like", "expand", "lift_fresh", "new_empty", "new_empty_strided", "permute",
        "select", "slice", "split", "split_with_sizes", "squeeze", "squeeze_", "t", "transpose", "unbind", "unsqueeze", "unsqueeze_", "view",
        "_unsafe_view", "_reshape_alias", "empty_strided", "resize_", "set_", "unfold", "view_as_real",
    )
) | {"prim.device", "prim.layout"}  # fmt: skip
"""Operations that start no kernel."""


def begin(library: str) -> None:
    """Load the device into the process: torch asks for its hooks once, when it is imported."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None and "torch" not in sys.modules
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(Path(spec.origin).parent / "lib" / name), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(library)


class Event:
    """torch.cuda.Event. What waits for one before it was recorded would read nothing."""

    recorded = False

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def record(self, *_: Any) -> None:
        self.recorded = True

    def synchronize(self) -> None:
        assert self.recorded


class Numbers(list):
    """What a step's figures read as: no value is known, so all are 1."""

    def __getitem__(self, at: Any) -> Any:
        found = list.__getitem__(self, at)
        return Numbers(found) if isinstance(at, slice) else found

    def tolist(self) -> list[float]:
        return list(self)


def as_cuda() -> None:
    """Have torch say that it has one GPU, and the studio that the driver shows it."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from app.machines import gpus
    from worker.modeling import cross_entropy
    from worker.runtime import transfer

    FakeTensorMode.avoid_device_init = property(lambda self: True)  # type: ignore[assignment,method-assign]
    waits: dict[str, Any] = {"synchronize": _refuse}
    said: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_lazy_init": lambda: None,
        "is_bf16_supported": lambda including_emulation=True: CARD["bf16"],
        "set_device": lambda device: None,
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "get_device_name": lambda device=None: CARD["name"],
        "get_device_capability": lambda device=None: CARD["capability"],
        "mem_get_info": lambda device=None: (CARD["memory"], CARD["memory"]),
        "memory_reserved": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 0,
        "set_per_process_memory_fraction": lambda share, device=None: CARD.update(share=share),
        "empty_cache": lambda: None,
        "get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda state, device=None: None,
        "manual_seed_all": lambda seed: None,
        "Event": Event,
    }
    for key, value in (said | waits).items():
        setattr(torch.cuda, key, value)
    torch.Tensor.pin_memory = lambda self, *_: self  # type: ignore[assignment,method-assign]
    torch.nn.Module._apply = _apply  # type: ignore[assignment,method-assign]
    transfer.AsyncScalars.read = lambda self: (self.there.synchronize(), Numbers([1.0] * self.host.numel()))[1]  # type: ignore[assignment,method-assign,union-attr]
    kernel = types.ModuleType("worker.kernels.gpu.cross_entropy")
    kernel.softmax_gradient_ = lambda logits, targets, losses: torch._foreach_zero_([logits, losses])  # type: ignore[attr-defined]
    sys.modules[kernel.__name__] = kernel
    cross_entropy.kernel_works = lambda device: True  # type: ignore[assignment]
    torch.nn.functional.scaled_dot_product_attention = attention  # type: ignore[assignment]
    gpus.first = lambda: (CARD["name"], CARD["memory"], CARD["capability"][0] + CARD["capability"][1] / 10)  # type: ignore[assignment]


def _refuse(*_: Any) -> None:
    raise AssertionError("the host waits for the device")


def attention(
    q: Any,
    k: Any,
    v: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: Any = None,
    enable_gqa: bool = False,
) -> Any:
    """torch's attention as a GPU without flash attention for these tensors computes it: the memory-efficient kernel where it takes them,
    which are equally many heads of queries, keys and values, and else every score written out, as torch does without a GPU."""
    import torch

    if torch.is_autocast_enabled("cuda"):
        q, k, v = (x.to(torch.get_autocast_dtype("cuda")) for x in (q, k, v))
    if k.shape[1] != q.shape[1] or q.dtype not in (torch.float16, torch.float32, torch.bfloat16):
        return torch._C._nn.scaled_dot_product_attention(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    bias = attn_mask
    if bias is not None:
        bias = torch.zeros_like(bias, dtype=q.dtype).masked_fill_(~bias, -torch.inf) if bias.dtype == torch.bool else bias
        bias = bias.expand(*q.shape[:3], -1)
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, dropout_p, is_causal, scale=scale)[0]


def _apply(self: Any, change: Any, recurse: bool = True) -> Any:
    """Module.to for fake parameters, whose data torch would swap and cannot."""
    import torch

    for child in self.children():
        child._apply(change)
    for key, p in self._parameters.items():
        if p is not None:
            with torch.no_grad():
                new = change(p)
            if new is not p:
                self._parameters[key] = torch.nn.Parameter(new, p.requires_grad)
    for key, b in self._buffers.items():
        if b is not None:
            self._buffers[key] = change(b)
    return self


class From:
    """In the place of transformers' Auto class: the same model on the device, whose weights were never read."""

    def __init__(self, auto: Any) -> None:
        self.auto = auto

    def from_pretrained(self, folder: Path, dtype: Any, attn_implementation: str, quantization_config: Any = None, **rest: Any) -> Any:
        import torch
        from transformers import AutoConfig

        assert torch.device(rest["device_map"][""]).type == "cuda", "the whole model would stand in the machine's memory first"
        built = {key: value for key, value in rest.items() if key == "add_pooling_layer"}
        with torch.device("cuda"):
            config = AutoConfig.from_pretrained(folder)
            model = self.auto.from_config(config, attn_implementation=attn_implementation, dtype=dtype, **built)
            if quantization_config is not None:
                in_4_bits(model, dtype)
        model.tie_weights()
        return model.eval()


def in_4_bits(model: Any, dtype: Any) -> None:
    """Every layer of the blocks as bitsandbytes keeps it on a card: packed NF4 with scales that are quantized too."""
    import torch
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Linear4bit

    for name, layer in list(model.named_modules()):
        if not isinstance(layer, torch.nn.Linear) or "layers." not in name:
            continue
        small = Linear4bit.__new__(Linear4bit)  # a Params4bit cannot hold a fake tensor, and it has nothing that is read here
        torch.nn.Linear.__init__(small, layer.in_features, layer.out_features, False, device="meta")
        small.compute_dtype, small.quant_storage = dtype, torch.uint8
        small.compute_type_is_set, small.support_avx512bf16_for_cpu = True, False
        count = layer.weight.numel()
        groups = -(-count // BLOCK)
        outer = QuantState(absmax=torch.empty(-(-groups // 256)), code=torch.empty(256), blocksize=256, dtype=torch.float32)
        state = QuantState(
            absmax=torch.empty(groups, dtype=torch.uint8), shape=layer.weight.shape, code=torch.empty(16), blocksize=BLOCK, quant_type="nf4",
            dtype=dtype, offset=torch.empty(()), state2=outer,
        )  # fmt: skip
        small.weight = torch.nn.Parameter(torch.empty(count // 2, 1, dtype=torch.uint8), requires_grad=False)
        small.weight.quant_state = small.quant_state = state
        small.weight.compress_statistics, small.weight.quant_type = True, "nf4"
        small.bias = layer.bias
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, small)
    model.is_quantized = model.is_loaded_in_4bit = True


@contextlib.contextmanager
def fake() -> Iterator[Any]:
    """Inside, nothing is computed, and what is done on the device is watched."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True), _watch() as watch:
        yield watch


def _watch() -> Any:
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    def tensors(values: Any) -> Iterator[Any]:
        """What torch's own search of arguments and results finds, in a third of the time: they are tensors and flat lists of them."""
        for x in values:
            if isinstance(x, torch.Tensor):
                yield x
            elif isinstance(x, tuple | list):
                yield from tensors(x)

    names: dict[Any, str] = {}

    class Watch(TorchDispatchMode):
        """Counts what is launched, notes what the host would wait for and what is computed on the host, and follows every byte of
        the device: one is taken by the first tensor over it, and given back by the last."""

        def __init__(self) -> None:
            super().__init__()
            self.alive = self.peak = 0
            self.held: dict[int, Any] = {}
            self.forget()

        def forget(self) -> None:
            """Begin anew: with a step, say. What is alive stays so."""
            self.launched: Counter[str] = Counter()
            self.waits: Counter[str] = Counter()
            self.on_host: Counter[str] = Counter()
            self.copied: Counter[str] = Counter()  # from the host or to it, waited for or not
            self.peak = self.alive

        def _follow(self, tensor: Any) -> None:
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key in self.held:
                return
            self.alive += size
            self.peak = max(self.peak, self.alive)

            def gone(_: Any) -> None:
                self.alive -= size
                self.held.pop(key, None)

            self.held[key] = weakref.ref(storage, gone)

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            name = names.get(func) or names.setdefault(func, str(func).rpartition(".")[0])
            out = func(*args, **kwargs)
            read, made = [*tensors(args), *tensors(kwargs.values())], list(tensors((out,)))
            kinds = {x.device.type for x in (*read, *made)}
            if "cuda" in kinds and name not in VIEWS:
                self.launched[name] += 1
                between = len(kinds) > 1 and name in ("aten._to_copy", "aten.copy_")
                self.copied[name] += between
                if between and not kwargs.get("non_blocking", name == "aten.copy_" and len(args) > 2 and args[2]):
                    self.waits[f"{name} {[str(x.device) for x in (*read, *made)]} {tuple(made[0].shape)}"] += 1
            elif kinds == {"cpu"} and any(x.dim() for x in made) and name not in VIEWS:
                self.on_host[name] += 1
            for tensor in made:
                if tensor.device.type == "cuda":
                    self._follow(tensor)
            return out

    return Watch()


class Graph:
    """In the place of a captured graph: running a step while it is captured launches nothing, and replaying it is one launch. Each made one is
    in `made`, with what a replay would launch in `launches` and what it would copy from the host or to it, which nothing may, in `copied`."""

    def __init__(self, watch: Any, made: list[Graph], step: Any) -> None:
        before, copied = watch.launched.copy(), sum(watch.copied.values())
        self.watch, self.out = watch, step()
        self.launches = sum((watch.launched - before).values())
        self.copied = sum(watch.copied.values()) - copied
        watch.launched = before
        made.append(self)

    def replay(self) -> None:
        self.watch.launched["a captured graph"] += 1
