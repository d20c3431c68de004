"""The pool of loaded models: loaded on first use, evicted when others need their memory.

A `LoadedModel` is one module tree with one slot cache; all its requests run in the same batch. A base and all its plain LoRA
adapters share one. Any other adapter gets a module tree of its own over the base's tensors, so each base is in memory once; only
a strategy that cannot share tensors loads its own copy.
"""

from __future__ import annotations

import copy
import itertools
import threading
import time
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from app.errors import DoesNotFit, Unavailable
from app.inference.residency import LoadedModelInfo
from app.machines.hardware import usable_memory
from app.models.integrity import check
from app.settings import get_settings
from app.spec import SILENT, ModelRef
from app.strategies import STRATEGIES
from app.strategies._model import transformer, wrapped
from app.strategies.dora import Dora
from worker import kernels
from worker.data import chat_template
from worker.inference import model_cache
from worker.inference.decode_graph import DecodeGraphs
from worker.inference.lora_stack import AdapterStack, LoraWeights, read_lora
from worker.kernels.cpu.small_batch_linear import patch_small_batch
from worker.modeling import padded
from worker.modeling.kv_cache import ATTENTION, Cache, ForwardPass, reads_slots, running
from worker.modeling.loading import LOADING, folder_of, lay_adapter, load_base, load_model, load_strategy, load_tokenizer
from worker.runtime import devices
from worker.runtime.device import gpu_memory
from worker.runtime.transfer import sent


@dataclass(eq=False)
class LoadedModel:
    """One loaded module tree. `users` counts the requests that hold it; only one without users can be evicted."""

    key: tuple[str, ...]
    model: torch.nn.Module
    device: torch.device
    dtype: torch.dtype
    context: int
    bytes_per_token: int
    stack: AdapterStack | None = None
    source: torch.nn.Module | None = None  # the unmodified tree of a base, from which other trees are copied
    weight_bytes: int = 0
    folders: list[str] = field(default_factory=list)  # of the adapters attached to its own tree
    padded: bool = False  # its texts are read whole at every step, since nothing is known of its cache
    lead: int = 0  # virtual tokens of a soft prompt, as placeholders before every prompt
    users: int = 0
    used_at: float = field(default_factory=time.monotonic)
    cache: Cache = field(init=False)
    graphs: DecodeGraphs | None = None  # on a GPU

    def __post_init__(self) -> None:
        self.cache = Cache(self.context, self.bytes_per_token)
        if (gpu := devices.gpu_of(self.device)) is not None and kernels.allowed():
            self.graphs = DecodeGraphs(self.device, gpu.capture)

    def nbytes(self) -> int:
        """Bytes of its weights, its adapters and its cache."""
        return self.weight_bytes + self.cache.nbytes() + (self.stack.nbytes() if self.stack else 0)

    @torch.inference_mode()
    def forward(self, step: ForwardPass, ids: list[int], positions: list[int], last: list[int]) -> torch.Tensor:
        """Logits (len(last), V) in float32 at the positions `last` of the flat row."""
        if self.padded:
            return self._whole(step, ids, last)
        if self.graphs is not None:
            found = self.graphs.logits(self._logits, step, ids, positions, self.stack.version if self.stack else 0)
            if found is not None:
                return found
        at = [sent(torch.tensor(numbers), self.device) for numbers in ([ids], [positions], last)]
        return self._logits(step, *at)

    def _logits(self, step: ForwardPass, ids: torch.Tensor, positions: torch.Tensor, last: torch.Tensor | int = 0) -> torch.Tensor:
        """For ids and positions (1, N); `last` is 0 for all of them."""
        with running(step):
            out = self.model(input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=last)
        return out.logits[0].float()

    def _whole(self, step: ForwardPass, ids: list[int], last: list[int]) -> torch.Tensor:
        """The same for a model that is given whole texts: those in the slots, and what each segment adds."""
        segments = [*step.decode, *step.prefill]
        texts = [[*s.slot.tokens[: s.past], *ids[s.start : s.start + s.count]] for s in segments]
        found = padded.whole_texts(self.model, texts)
        flat = torch.cat([logits[s.past :] for s, logits in zip(segments, found, strict=True)])
        return flat[torch.tensor(last, device=self.device)].float()


@dataclass(frozen=True, eq=False)
class ModelHandle:
    """Where a request runs: the loaded model, the tokenizer, and the stacked adapters it uses, by hash."""

    lane: LoadedModel
    tokenizer: Any
    stop_ids: frozenset[int]
    adapters: dict[str, LoraWeights]


class ModelPool:
    """The loaded models. Thread-safe: while one thread loads a model, only requests for that model wait."""

    def __init__(self, memory_bytes: int | None = None, device: str | None = None) -> None:
        self.device = torch.device(device or devices.best().kind)
        # Float32 on a CPU unless configured otherwise: bf16 is faster, but makes an answer depend on what else is in the batch
        # (benchmarks/NOTES.md has the numbers).
        half = devices.is_gpu(self.device) or get_settings().generate_precision == "bf16"
        self.dtype = torch.bfloat16 if half else torch.float32
        self.memory_bytes = memory_bytes or _memory_for_models(self.device)
        self.training_bytes = 0  # taken by jobs that train on this machine
        self._device_bytes = _device_bytes(self.device)
        self.lanes: dict[tuple[str, ...], LoadedModel] = {}
        self.tokenizers: dict[tuple[str, ...], tuple[Any, frozenset[int]]] = {}
        self.adapters: dict[tuple[str, ...], LoraWeights] = {}
        self.loads = 0
        self._lock, self._reading = threading.RLock(), threading.Lock()
        self._loading: dict[tuple[str, ...], threading.Lock] = {}

    def place(self, ref: ModelRef) -> ModelHandle:
        """Find or load the model of `ref`. It is held until `release`. Raises DoesNotFit, BadModel or Unavailable."""
        if ref.kind in SILENT:
            raise DoesNotFit(
                f"{ref.name} is {SILENT[ref.kind]}: it does not write text.",
                hint="Choose a generic, instruction or dialogue model.",
                param="model",
            )
        base = self._lane((ref.path, ref.revision), ref, self._load_base)
        try:
            adapters = {} if not ref.adapters else self._stackable(ref, base)
            if adapters is None:
                key = (ref.path, ref.revision, *(a.key for a in ref.adapters))
                lane = self._lane(key, ref, lambda r: self._load_adapted(r, base))
                self.release(base)
                base, adapters = lane, {}
            tokenizer, stops = self.tokenizer(ref, getattr(base.model, "generation_config", None))
        except BaseException:
            self.release(base)
            raise
        return ModelHandle(base, tokenizer, stops, adapters)

    def release(self, lane: LoadedModel) -> None:
        with self._lock:
            lane.users -= 1
            lane.used_at = time.monotonic()

    def memory(self) -> int:
        """Bytes of all weights and caches, including encoders and classifiers."""
        with self._lock:
            return model_cache.memory() + sum(lane.nbytes() for lane in self.lanes.values())

    def weights_of(self, lane: LoadedModel) -> int:
        """Bytes of a model without its cache, including the base whose tensors it shares."""
        with self._lock:
            family = {id(one): one for one in (lane, self.lanes.get(lane.key[:2])) if one is not None}
        return sum(one.weight_bytes for one in family.values())

    def limit(self) -> int:
        """Bytes that may be in use now; training jobs on this machine come first, and on a GPU whatever else has its memory."""
        limit = min(self.memory_bytes, int(0.95 * self._device_bytes) - self.training_bytes)
        if (gpu := devices.gpu_of(self.device)) is not None:
            limit = min(limit, gpu_memory(self.device)[0] + gpu.reserved_memory(self.device))
        return max(0, limit)

    def ready(self) -> list[LoadedModelInfo]:
        """Every loaded base with the adapters that share its weights."""
        now = time.monotonic()
        found: dict[tuple[str, ...], LoadedModelInfo] = {}
        with self._lock:
            lanes = sorted(self.lanes.values(), key=lambda lane: len(lane.key))
            stacked = {lane.key: [w.path for w in list(lane.stack.loaded.values())] for lane in lanes if lane.stack is not None}
        for lane in lanes:
            one = found.setdefault(lane.key[:2], LoadedModelInfo(path=lane.key[0], bytes=0, idle_seconds=now - lane.used_at))
            one.bytes += lane.nbytes()
            one.answering += lane.users
            one.idle_seconds = 0.0 if one.answering else min(one.idle_seconds, now - lane.used_at)
            one.adapters += [*stacked.get(lane.key, []), *lane.folders]
        return list(found.values())

    # Putting away -----------------------------------------------------------------------------------------------------

    def evict(self, before: float) -> int:
        """Evict models without users that were last used before this time of the monotonic clock; returns how many."""
        with self._lock:
            old = [lane for lane in self._idle() if lane.used_at < before]
            for lane in old:
                self._drop(lane)
        return len(old)

    def fit(self, more_bytes: int) -> int:
        """Evict idle models, least recently used first, until this many more bytes fit in the limit; returns how many."""
        gone = 0
        with self._lock:
            while self.memory() + more_bytes > self.limit() and (idle := self._idle()):
                self._drop(idle[0])
                gone += 1
        return gone

    def trim(self) -> None:
        """Free unused parts of caches. Called by the engine's thread, which writes them."""
        for lane in list(self.lanes.values()):
            lane.cache.trim()

    def training_needs_it(self, name: str) -> Unavailable:
        return Unavailable(
            f"A job that trains on this machine needs the memory that {name} would take.",
            hint="Ask again when the job has ended, or pause it; a smaller model may fit now.",
            code="training_needs_memory",
        )

    def _idle(self) -> list[LoadedModel]:
        """Models that can be evicted, least recently used first. A base stays while other trees use its tensors."""
        needed = {lane.key[:2] for lane in self.lanes.values() if len(lane.key) > 2}
        free = [lane for lane in self.lanes.values() if not lane.users and not (len(lane.key) == 2 and lane.key in needed)]
        return sorted(free, key=lambda lane: lane.used_at)

    def _drop(self, lane: LoadedModel) -> None:
        del self.lanes[lane.key]
        if len(lane.key) == 2:  # its adapters are in its stack
            self.adapters = {key: weights for key, weights in self.adapters.items() if key[:2] != lane.key}

    # Loading ----------------------------------------------------------------------------------------------------------

    def _lane(self, key: tuple[str, ...], ref: ModelRef, load: Any) -> LoadedModel:
        with self._lock:
            loading = self._loading.setdefault(key, threading.Lock())
        with loading:
            with self._lock:
                if lane := self.lanes.get(key):
                    lane.users += 1
                    lane.used_at = time.monotonic()
                    return lane
                if len(key) == 2:
                    self.make_room(ref.name, ref.shape.parameters() * self.dtype.itemsize)
            with LOADING:
                lane = load(ref)
            lane.users = 1
            with self._lock:
                self.lanes[key] = lane
                self.loads += 1
            return lane

    def make_room(self, name: str, need: int) -> None:
        """Evict idle models until `need` bytes for one more fit. Raises DoesNotFit or Unavailable when they cannot."""
        if need > self.memory_bytes:
            raise DoesNotFit(
                f"{name} needs {need / 2**30:.1f} GiB, and the playground may use {self.memory_bytes / 2**30:.1f} GiB.",
                hint="Choose a smaller model, or raise LUTHIER_GENERATE_MEMORY_BYTES.",
                param="model",
            )
        self.fit(need)
        if self.memory() + need > self.limit():
            for one in model_cache.ALL:
                one.evict(time.monotonic())
        if self.memory() + need <= self.limit():
            return
        if need > self.limit() and self.training_bytes:
            raise self.training_needs_it(name)
        raise Unavailable(f"There is no memory for {name} while other models are answering.", hint="Try again in a moment.")

    def _load_base(self, ref: ModelRef) -> LoadedModel:
        check(ref.path, ref.name, ref.revision, may_be_plain=True)
        model = load_base(ref, self.dtype, "sdpa", str(self.device)).requires_grad_(False)
        lane = self._as_lane((ref.path, ref.revision), ref, model)
        lane.source = share_weights(model)
        patch_small_batch(model, join=not lane.padded)
        if not lane.padded:
            lane.stack = AdapterStack(model)
        return lane

    def _load_adapted(self, ref: ModelRef, base: LoadedModel) -> LoadedModel:
        """A module tree of its own for adapters that cannot be stacked, over the base's tensors where that is safe."""
        for adapter in ref.adapters:
            check(adapter.path, ref.name, may_be_plain=True)
        if len(ref.adapters) == 1 and STRATEGIES[ref.adapters[0].strategy].switchable and base.source is not None:
            tree = share_weights(base.source)
            before = {id(p): p._version for p in base.source.parameters()}
            model = lay_adapter(tree, ref.adapters[0]).requires_grad_(False)
            if any(p._version != before[id(p)] for p in base.source.parameters()):
                with self._lock:  # the strategy wrote into the shared weights: they are no longer the base's
                    self.lanes.pop(base.key, None)
                model = load_model(ref, self.dtype, "sdpa", str(self.device))
        else:
            model = load_model(ref, self.dtype, "sdpa", str(self.device))
        model = model.requires_grad_(False).eval()
        if STRATEGIES[ref.adapters[-1].strategy] is Dora:
            from worker.modeling.fused_lora import fuse_dora  # peft's layers take a while to import

            fuse_dora(model)
        patch_small_batch(model, join=False)  # without joining, which moves weights: they may be the base's
        lane = self._as_lane((ref.path, ref.revision, *(a.key for a in ref.adapters)), ref, model)
        shared = {p.data_ptr() for p in base.source.parameters()} if base.source is not None else set()
        lane.weight_bytes = sum(p.nbytes for p in model.parameters() if p.data_ptr() not in shared)
        lane.folders = [adapter.path for adapter in ref.adapters]
        lane.lead = load_strategy(folder_of(ref.adapters[-1].path)).virtual_tokens()
        return lane

    def _as_lane(self, key: tuple[str, ...], ref: ModelRef, model: torch.nn.Module) -> LoadedModel:
        if devices.is_gpu(self.device) and kernels.allowed():
            from worker.modeling.fused_layers import patch_norms  # with compilers, which a CPU's answers do without

            patch_norms(model)
        shape = ref.shape
        whole = shape.structure is not None and not shape.structure.packs
        if not whole:
            _use_slots(model, ref)
        return LoadedModel(
            key=key,
            model=model,
            device=self.device,
            dtype=self.dtype,
            context=min(shape.positions, get_settings().generate_context),
            bytes_per_token=1 if whole else 2 * shape.layers * shape.kv_heads * shape.head_dim * self.dtype.itemsize,
            padded=whole,
            weight_bytes=sum(p.nbytes for p in model.parameters()),
        )

    def _stackable(self, ref: ModelRef, base: LoadedModel) -> dict[str, LoraWeights] | None:
        """The adapters as matrices for the base's stack; None when one of them is more than plain LoRA."""
        found: dict[str, LoraWeights] = {}
        for adapter in ref.adapters:
            key = (*base.key, adapter.key or adapter.path)
            with self._lock:
                weights = self.adapters.get(key)
            if weights is None:
                if base.stack is None or not STRATEGIES[adapter.strategy].adapter:
                    return None
                check(adapter.path, ref.name, may_be_plain=True)
                weights = read_lora(folder_of(adapter.path), base.stack.linears, self.dtype, self.device, adapter.blend)
                if weights is None:
                    return None
                weights = replace(weights, path=adapter.path)
                with self._lock:
                    self.adapters[key] = weights
                    while len(self.adapters) > 64:
                        self.adapters.pop(next(iter(self.adapters)))
            found[key[2]] = weights
        return found

    def tokenizer(self, ref: ModelRef, generation_config: Any = None) -> tuple[Any, frozenset[int]]:
        """The tokenizer of a model, ready to render, and its end-of-answer tokens. The weights need not be loaded."""
        key = (ref.path, ref.revision, *(a.key for a in ref.adapters))
        with self._lock:
            loading = self._loading.setdefault(("tokenizer", *key), threading.Lock())
        with loading:  # per model: a template that has to be stopped delays nobody who uses another model
            with self._lock:
                if found := self.tokenizers.get(key):
                    return found
            with self._reading:
                tokenizer = load_tokenizer(ref)
            chat_template.prepare_tokenizer(tokenizer)
            stops = chat_template.stop_ids(tokenizer, generation_config or _generation_config(ref))
            with self._lock:
                if len(self.tokenizers) >= 32:
                    self.tokenizers.pop(next(iter(self.tokenizers)))
                self.tokenizers[key] = found = (tokenizer, frozenset(stops))
            return found


def _generation_config(ref: ModelRef) -> Any:
    """The generation config in the model's folder; None when there is none."""
    from transformers import GenerationConfig

    folder = folder_of(ref.path)
    return GenerationConfig.from_pretrained(folder) if (folder / "generation_config.json").is_file() else None


def share_weights(model: torch.nn.Module) -> torch.nn.Module:
    """A copy of the module tree over the same tensors: structural changes of one leave the other unchanged."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(t): t for t in tensors})


def _use_slots(model: torch.nn.Module, ref: ModelRef) -> None:
    """Switch the model's attention to the slot cache. Raises DoesNotFit where its architecture does not support that."""
    inner = transformer(wrapped(model).get_base_model() if hasattr(model, "get_base_model") else model)
    if getattr(inner.config, "use_bidirectional_attention", False):
        raise DoesNotFit(
            f"{ref.name} reads in both directions, so it cannot write one token after the other.",
            hint="Choose a model that reads forwards only.",
            param="model",
        )
    if reads_slots(inner):
        inner.set_attn_implementation(ATTENTION)
    if inner.config._attn_implementation != ATTENTION:
        raise DoesNotFit(
            f"The playground cannot run the architecture {inner.config.model_type} of {ref.name}.",
            hint="Choose a decoder model that supports transformers' attention interface, such as Llama, Qwen or Gemma.",
            param="model",
        )


def _device_bytes(device: torch.device) -> int:
    """Total memory of the device: the GPU's, or the machine's within its control group."""
    return gpu_memory(device)[1] if devices.is_gpu(device) else usable_memory()


def _memory_for_models(device: torch.device) -> int:
    """The configured limit, else half of the machine's memory, or four fifths of the GPU's."""
    if (said := get_settings().generate_memory_bytes) is not None:
        return said
    if devices.is_gpu(device):
        return int(_device_bytes(device) * 0.8)
    return usable_memory() // 2
