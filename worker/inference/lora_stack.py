"""Many LoRA adapters on one base, in one batch.

Each adapted linear layer holds the A and B matrices of all loaded adapters concatenated: A (R, in) and B (R, out), R the sum of
the ranks. One product with A, a mask that keeps each token's own columns, and one product with B give every token the correction
of its own adapter, and none to a token of the bare base. Two small products per layer, whatever the number of adapters (after
Sheng et al. 2023, S-LoRA, https://arxiv.org/abs/2311.03285, section 5, with one masked product instead of a custom kernel).
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from app.models.integrity import BadModel
from app.strategies._files import NEW_TOKENS
from worker.kernels.cpu.small_batch_linear import SmallBatchLinear
from worker.modeling.kv_cache import Selection, current_step

Pair = tuple[torch.Tensor, torch.Tensor]  # A (r, in), and B (r, out) with the scaling factor applied


@dataclass(frozen=True)
class LoraWeights:
    """One adapter: its matrices by the name of the layer they correct. `rank` is the largest of them, `path` its folder."""

    layers: dict[str, Pair]
    rank: int
    path: str = ""


def _plain(config: dict[str, Any]) -> bool:
    """Whether the adapter is plain B·A on linear layers, which is all that the stack supports."""
    extras: tuple[str, ...] = (
        "use_dora",
        "modules_to_save",
        "fan_in_fan_out",
        "trainable_token_indices",
        "alora_invocation_tokens",
        "lora_bias",
    )
    extras += ("layer_replication", "megatron_config", "target_parameters", "use_qalora", "arrow_config", "use_bdlora", "velora_config")
    return config.get("peft_type") == "LORA" and config.get("bias", "none") == "none" and not any(config.get(x) for x in extras)


def read_lora(
    folder: Path, linears: dict[str, torch.nn.Linear], dtype: torch.dtype, device: torch.device, blend: float = 1.0
) -> LoraWeights | None:
    """Read a folder in peft's layout; None when it holds more than plain LoRA, so that peft itself must load it. `blend` scales
    the correction. Raises BadModel for non-finite values."""
    settings = folder / "adapter_config.json"
    if not settings.is_file() or (folder / NEW_TOKENS).is_file():
        return None
    config = json.loads(settings.read_text("utf-8"))
    if not _plain(config):
        return None
    tensors = load_file(folder / "adapter_model.safetensors")
    if broken := next((name for name, tensor in tensors.items() if not tensor.isfinite().all()), None):
        raise BadModel(  # 0 · NaN is NaN: it would reach the other rows of the batch
            f"The adapter's {broken} holds numbers that are none (NaN), as when training diverged.", hint="Take an earlier checkpoint."
        )
    layers: dict[str, Pair] = {}
    for name, a in tensors.items():
        if not name.endswith(".lora_A.weight"):
            continue
        layer = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        b = tensors[name.replace(".lora_A.", ".lora_B.")]
        linear = linears.get(layer)
        if linear is None or (linear.in_features, linear.out_features) != (a.shape[1], b.shape[0]):
            return None
        scaled = b.float().T * (blend * _scaling(config, layer, a.shape[0]))
        layers[layer] = (a.to(device, dtype), scaled.contiguous().to(device, dtype))
    if 2 * len(layers) != len(tensors) or not layers:
        return None
    return LoraWeights(layers, max(a.shape[0] for a, _ in layers.values()))


def _scaling(config: dict[str, Any], layer: str, rank: int) -> float:
    from peft.utils.other import get_pattern_key

    patterns = config.get("alpha_pattern") or {}
    alpha = patterns.get(get_pattern_key(list(patterns), layer), config["lora_alpha"])
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


class StackedLinear(torch.nn.Module):
    """A linear layer plus the corrections of all loaded adapters."""

    def __init__(self, base: torch.nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.a: torch.Tensor | None = None  # (R, in)
        self.b: torch.Tensor | None = None  # (R, out)

    @property
    def weight(self) -> torch.Tensor:
        return self.base.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base(x)
        step = current_step()
        chosen = step.selection if step is not None else None
        if chosen is None or self.a is None or self.b is None:
            return y
        # Columns outside [low, high) are of adapters that no token of this step uses.
        low, high = chosen.low, chosen.high
        h = x.reshape(-1, x.shape[-1]) @ self.a[low:high].T
        if chosen.mask is not None:
            h *= chosen.mask
        y.view(-1, y.shape[-1]).addmm_(h, self.b[low:high])
        return y


class AdapterStack:
    """The adapters loaded on one base. Keys are adapter hashes; the least recently used are evicted for new ones."""

    def __init__(self, model: torch.nn.Module, most_columns: int = 512) -> None:
        self.most_columns = most_columns
        self.model = model
        self.linears: dict[str, torch.nn.Linear] = {
            n: m for n, m in model.named_modules() if type(m) in (torch.nn.Linear, SmallBatchLinear)
        }
        self.wrapped: dict[str, StackedLinear] = {}
        self.loaded: dict[str, LoraWeights] = {}  # in order of last use
        self.columns: dict[str, tuple[int, int]] = {}
        self.version = 0  # changes with the concatenated matrices

    def add(self, key: str, weights: LoraWeights, busy: set[str]) -> None:
        """Add an adapter to the stack; only adapters outside `busy` may be evicted for it."""
        self.loaded[key] = weights
        idle = [k for k in self.loaded if k not in busy and k != key]
        while idle and sum(w.rank for w in self.loaded.values()) > self.most_columns:
            del self.loaded[idle.pop(0)]
        self._restack()

    def nbytes(self) -> int:
        """Bytes of the concatenated matrices."""
        return sum(t.nbytes for layer in list(self.wrapped.values()) for t in (layer.a, layer.b) if t is not None)

    def use(self, adapters: dict[str, LoraWeights], busy: set[str]) -> None:
        """Load these adapters where they are not loaded, keeping those that are `busy`."""
        for key, weights in adapters.items():
            if key in self.loaded:
                # To the end of the dict, which is in order of last use.
                self.loaded[key] = self.loaded.pop(key)
            else:
                self.add(key, weights, busy | set(adapters))

    def _restack(self) -> None:
        """Concatenate the matrices again: a copy of a few megabytes, between two steps."""
        self.columns, at = {}, 0
        self.version += 1
        for key, weights in self.loaded.items():
            self.columns[key] = (at, at + weights.rank)
            at += weights.rank
        names = {name for weights in self.loaded.values() for name in weights.layers}
        # A layer is wrapped when an adapter first corrects it, and stays wrapped.
        for name in names - self.wrapped.keys():
            parent, _, leaf = name.rpartition(".")
            self.wrapped[name] = StackedLinear(self.linears[name])
            setattr(self.model.get_submodule(parent), leaf, self.wrapped[name])
        for name, layer in self.wrapped.items():
            layer.a = layer.b = None
            if name in names:
                weight = self.linears[name].weight
                layer.a = weight.new_zeros(at, weight.shape[1])
                layer.b = weight.new_zeros(at, weight.shape[0])
                for key, weights in self.loaded.items():
                    if name in weights.layers:
                        (a, b), low = weights.layers[name], self.columns[key][0]
                        layer.a[low : low + len(a)], layer.b[low : low + len(b)] = a, b

    def select(self, tokens: list[tuple[int, tuple[str, ...]]]) -> Selection | None:
        """The columns and mask for a flat row of runs of `tokens`: (number of tokens, the adapters they use)."""
        used = {key for _, keys in tokens for key in keys}
        if not used:
            return None
        low = min(self.columns[k][0] for k in used)
        high = max(self.columns[k][1] for k in used)
        # Where all tokens use the same adapters and these fill the columns, there is nothing to mask.
        if len({keys for _, keys in tokens}) == 1 and sum(self.loaded[k].rank for k in used) == high - low:
            return Selection(low, high, None)
        weight = next(iter(self.linears.values())).weight
        mask = weight.new_zeros(sum(n for n, _ in tokens), high - low)
        at = 0
        for n, keys in tokens:
            for key in keys:
                a, b = self.columns[key]
                mask[at : at + n, a - low : b - low] = 1
            at += n
        return Selection(low, high, mask)
