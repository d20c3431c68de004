"""What a layer is said to keep for the backward pass is what autograd keeps, counted tensor by tensor."""

from __future__ import annotations

import weakref
from typing import NamedTuple

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from app.planning.memory import layer_bytes
from app.shapes import Shape, shape_of
from app.strategies import STRATEGIES
from worker.data.batching import Tokenised, make_batch
from worker.kernels.cpu import attention as amx_attention
from worker.kernels.cpu.full_tuning import patch_full_tuning, uses_full_tuning
from worker.modeling import fused_layers, packed_attention
from worker.modeling.cross_entropy import head_of, linear_cross_entropy
from worker.runtime.device import Compute
from worker.scoring import held_out

WIDTHS = {"hidden_size": 192, "intermediate_size": 512, "num_attention_heads": 6, "vocab_size": 600, "max_position_embeddings": 2048}
CPU = torch.device("cpu")


class Counted(NamedTuple):
    bytes: int
    tokens: int


def kept_by(name: str, precision: str, layers: int, tokens: int) -> Counted:
    """Bytes that autograd holds between the passes over a decoder, the parameters left out."""
    torch.manual_seed(0)
    strategy = STRATEGIES[name]()
    half = precision == "bf16"
    frozen = torch.bfloat16 if half and strategy.adapter else torch.float32
    model = LlamaForCausalLM(LlamaConfig(**WIDTHS, num_key_value_heads=2, num_hidden_layers=layers)).to(frozen)
    model.set_attn_implementation(packed_attention.NAME)
    fused_layers.patch_layers(model)
    model = strategy.attach(model).train()
    engine = Compute(CPU, "cpu", precision, frozen, 1)
    fused_layers.speed_up(model, engine, 0.0)
    if uses_full_tuning(strategy, engine):
        patch_full_tuning(model, engine)
    lead = strategy.virtual_tokens()
    rows = [np.asarray([0] * lead + list(range(1, 1 + tokens // 4)), np.int32)] * 4
    starts = np.concatenate([[0], np.cumsum([len(r) for r in rows])]).astype(np.int64)
    trained = np.ones(starts[-1], bool)
    trained[(starts[:-1, None] + np.arange(lead + 1)).ravel()] = False
    data = Tokenised(np.concatenate(rows), trained, starts, list(range(4)), 0, [])
    held = Holding(model)
    with held:
        batch = make_batch(data, range(4), CPU)
        hidden = held_out.hidden_states(model, batch, engine)
        loss = linear_cross_entropy(hidden, head_of(held_out.plain_model(model)), batch.targets, engine.compute)
    assert loss.requires_grad
    return Counted(held.bytes, batch.input_ids.shape[1])


class Saved:
    """A tensor as autograd holds it: gone when the graph that needs it is."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


class Holding:
    """Counts the memory behind the tensors that autograd saved while inside and still holds: what is made of the model's
    weights and then detached, as DoRA's lengths are, keeps nothing."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
        self.saved: list[weakref.ref[Saved]] = []
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.save, lambda saved: saved.tensor)

    def save(self, tensor: torch.Tensor) -> Saved:
        saved = Saved(tensor)
        self.saved.append(weakref.ref(saved))
        return saved

    def __enter__(self) -> None:
        self.hooks.__enter__()

    def __exit__(self, *error: object) -> None:
        self.hooks.__exit__(*error)

    @property
    def bytes(self) -> int:
        alive = [saved.tensor.untyped_storage() for ref in self.saved if (saved := ref()) is not None]
        return sum({s.data_ptr(): s.nbytes() for s in alive if s.data_ptr() not in self.own}.values())


def decoder() -> Shape:
    return shape_of(LlamaConfig(**WIDTHS, num_key_value_heads=2, num_hidden_layers=2).to_dict())


WHOLE = [n for n in STRATEGIES if n not in ("qlora", "feature_extraction", "bitfit", "top_layers", "dense_head")]


IN_BF16 = ["lora", "rslora", "pissa", "dora", "adalora", "vera", "ia3", "full"]


@pytest.mark.parametrize(("name", "precision"), [*((n, "fp32") for n in WHOLE), *((n, "bf16") for n in IN_BF16)])
def test_a_layer_keeps_what_was_said(name: str, precision: str) -> None:
    """Two layers more, and the difference between them, so that what stands outside the layers cancels."""
    few, many = (kept_by(name, precision, layers, 512) for layers in (2, 4))  # the lowest may keep less
    measured = (many.bytes - few.bytes) / 2
    per_token, once = layer_bytes(
        decoder(), STRATEGIES[name](), precision == "bf16", cuda=False, whole=name == "full", units=amx_attention.is_available()
    )
    assert few.tokens * per_token + once == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize(("name", "layers"), [("top_layers", 2), ("dense_head", 0)])
def test_gradients_reach_no_further_than_said(name: str, layers: int) -> None:
    assert STRATEGIES[name]().reaches(decoder()) == layers
    assert kept_by(name, "fp32", 4, 128).bytes == kept_by(name, "fp32", 3, 128).bytes


@pytest.mark.parametrize("name", ["full", "lora", "bitfit"])
def test_an_encoders_layer_keeps_what_was_said(name: str) -> None:
    def kept(layers: int) -> int:
        model = BertModel(BertConfig(**WIDTHS, num_hidden_layers=layers), add_pooling_layer=False)
        model.set_attn_implementation(packed_attention.NAME)
        model = STRATEGIES[name]().attach(model, task="classification").eval()
        fused_layers.speed_up(model, Compute(CPU, "cpu", "fp32", torch.float32, 1), 0.0)
        held = Holding(model)
        with held:
            places = torch.cat([torch.arange(128)] * 4)[None]
            ids = torch.ones(1, 512, dtype=torch.long)
            out = model(input_ids=ids, position_ids=places, **packed_attention.packed_arguments([128] * 4, CPU))
        assert out.last_hidden_state.requires_grad
        return held.bytes

    shape = shape_of(BertConfig(**WIDTHS, num_hidden_layers=2).to_dict())
    per_token, once = layer_bytes(shape, STRATEGIES[name](), False, cuda=False)
    assert 512 * per_token + once == pytest.approx((kept(3) - kept(1)) / 2, rel=0.02)


@pytest.mark.parametrize("name", ["top_layers", "layer_norm"])
def test_weights_that_learn_are_float32_whatever_the_others_are(name: str) -> None:
    model = LlamaForCausalLM(LlamaConfig(**WIDTHS, num_key_value_heads=2, num_hidden_layers=3)).to(torch.bfloat16)
    model = STRATEGIES[name]().attach(model)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
