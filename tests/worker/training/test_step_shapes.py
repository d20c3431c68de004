"""The engine as a GPU runs it, on the processor: packs of one shape, the table of sequence ends, compiled blocks.

torch's own variable-length attention is called, with its own rules for shapes and gradients; only the kernel behind it is
written out here, and refuses what the real one would read outside its tensors for.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import LlamaConfig, LlamaForCausalLM

from app.strategies import STRATEGIES
from worker.data.batching import LEARNT_MULTIPLE, NOT_LEARNT, Tokenised, make_batch
from worker.data.packing import plan
from worker.kernels.gpu import fp8
from worker.modeling import fused_layers, packed_attention
from worker.modeling.cross_entropy import head_of, linear_cross_entropy
from worker.modeling.fused_lora import fuse
from worker.modeling.packed_attention import PackShape, frame_for, frame_of, frames_of, packed_arguments
from worker.runtime.device import Compute
from worker.scoring import held_out
from worker.training import optim

CPU = torch.device("cpu")
CONFIG = LlamaConfig(
    hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, vocab_size=300,
    max_position_embeddings=512, tie_word_embeddings=True,
)  # fmt: skip
BUDGET = 192


class Framed(Compute):
    """A processor that packs as a GPU does."""

    framed = True


ENGINE, PLAIN = (kind(CPU, "cpu", "bf16", torch.bfloat16, 1) for kind in (Framed, Compute))


def _sequences(q, k, v, ends, longest, scale, window):
    """Each sequence of a pack as (slice, queries, keys, values, probabilities, scale), the first four (heads, L, …) in float32."""
    spans = ends.diff().tolist()
    assert ends.dtype == torch.int32 and int(ends[0]) == 0 and int(ends[-1]) == q.shape[0], "the table does not cover the pack"
    assert min(spans) >= 0 and max(spans) <= longest, "a sequence is longer than the kernel is told"
    assert q.dtype == k.dtype == v.dtype == torch.bfloat16 and window == [-1, 0]
    scale = scale or q.shape[-1] ** -0.5
    for start, length in zip(ends.tolist(), spans, strict=False):
        own = slice(start, start + length)
        rows = [x[own].float().transpose(0, 1) for x in (q, k, v)]
        rows[1:] = [x.repeat_interleave(q.shape[1] // k.shape[1], 0) for x in rows[1:]]
        scores = (rows[0] @ rows[1].transpose(1, 2) * scale).masked_fill(torch.ones(length, length).triu(1).bool(), float("-inf"))
        yield own, *rows, scores.softmax(-1), scale


def _forward(q, k, v, ends, _, longest, __, causal=False, scale=None, window=None, grouped=False, *rest):
    assert causal and (grouped or q.shape[1] == k.shape[1]), "grouped heads were not announced"
    out = torch.empty_like(q)
    for own, _q, _k, values, p, _s in _sequences(q, k, v, ends, longest, scale, window):
        out[own] = (p @ values).transpose(0, 1).to(q.dtype)
    return out, torch.zeros(q.shape[1], q.shape[0]), torch.zeros(2, dtype=torch.uint64)


def _backward(grad, q, k, v, out, lse, ends, _, longest, __, causal, rng, scale=None, window=None):
    found = [torch.empty_like(x) for x in (q, k, v)]
    for own, queries, keys, values, p, factor in _sequences(q, k, v, ends, longest, scale, window):
        d_out = grad[own].float().transpose(0, 1)
        d_p = d_out @ values.transpose(1, 2)
        d_scores = p * (d_p - (d_p * p).sum(-1, keepdim=True)) * factor
        for whole, part in zip(found, (d_scores @ keys, d_scores.transpose(1, 2) @ queries, p.transpose(1, 2) @ d_out), strict=True):
            whole[own] = part.unflatten(0, (whole.shape[1], -1)).sum(1).transpose(0, 1).to(whole.dtype)
    return tuple(found)


@pytest.fixture
def kernel() -> Iterator[None]:
    """A kernel for the processor behind torch's operator, for the time of a test."""
    with torch.library._scoped_library("torch_attn", "IMPL") as library:
        library.impl("_varlen_attn", _forward, "CPU")
        library.impl("_varlen_attn_backward", _backward, "CPU")
        yield
    torch._dynamo.reset()


def samples(count: int = 70) -> Tokenised:
    """Sequences of 6 to 90 tokens; the second half of each is learnt."""
    draw = random.Random(3)
    sizes = [min(90, max(6, int(18 * 2.7 ** draw.gauss(0, 0.8)))) for _ in range(count)]
    starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    ids = np.asarray([draw.randrange(3, 300) for _ in range(starts[-1])], np.int32)
    trained = np.zeros(starts[-1], bool)
    for start, size in zip(starts, sizes, strict=False):
        trained[start + size // 2 : start + size] = True
    return Tokenised(ids, trained, starts, list(range(count)), 0, [])


DATA = samples()


class Run:
    """A few steps of LoRA over different packs: their losses, the first gradient, and how often a graph was made until each."""

    def __init__(
        self, engine: Compute, compiled: bool, recompute: int = 0, in_fp8: bool = False, strategy: str = "lora", steps: int = 4
    ) -> None:
        torch.manual_seed(2)
        chosen = STRATEGIES[strategy]()
        model = LlamaForCausalLM(CONFIG).to(torch.bfloat16 if chosen.adapter else torch.float32)
        model.set_attn_implementation(packed_attention.NAME)
        fused_layers.patch_norms(model)
        model = chosen.attach(model).train()
        fused_layers.recompute_layers(held_out.plain_model(model), recompute)
        fused_layers.round_embeddings(held_out.plain_model(model), engine.compute)
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.data = torch.randn(p.shape) * 0.05
        if in_fp8:
            assert fp8.patch_fp8(fused_layers.blocks_of(model)) == 21
        if strategy == "lora":
            assert fuse(model, grouped=not (compiled and recompute))
        self.counter = CompileCounterWithBackend("aot_eager")
        if compiled:
            fused_layers.compile_blocks(model, self.counter)
            torch._dynamo.config.suppress_errors = False
        frame = frame_of(DATA.lengths, BUDGET) if engine.framed else None
        packs = plan(DATA.lengths, BUDGET, seed=1, epoch=0, most=frame_of(DATA.lengths, BUDGET).max_sequences())[:steps]
        assert len({len(pack) for pack in packs}) > 1, "all packs hold the same number of sequences, so nothing is shown"
        trained = optim.trained_parameters(model)
        optimizer = optim.make_optimizer(trained, 2e-3, 0.0)
        self.losses, self.graphs, self.gradient = [], [], None
        for pack in packs:
            batch = make_batch(DATA, pack, CPU, frame)
            hidden = held_out.hidden_states(model, batch, engine)
            loss = linear_cross_entropy(hidden, head_of(held_out.plain_model(model)), batch.targets, engine.compute) / batch.trained
            loss.backward()
            if self.gradient is None:
                self.gradient = torch.cat([p.grad.flatten().double() for p in trained.values()])
            optim.optimizer_step(optimizer, optim.clip_grad_norm(trained, 1.0))
            optimizer.zero_grad(set_to_none=True)
            self.losses.append(loss.item())
            self.graphs.append(self.counter.frame_count)


@pytest.fixture(scope="module")
def plain() -> Run:
    """The same steps with packs as they come, sequence by sequence, not compiled."""
    return Run(PLAIN, False)


@pytest.fixture(autouse=True)
def _settings(monkeypatch) -> Iterator[None]:
    monkeypatch.setattr(fused_layers, "_compiled", False)
    with torch._dynamo.config.patch(suppress_errors=False, recompile_limit=8):
        yield


@pytest.mark.long
@pytest.mark.parametrize(
    ("compiled", "recompute", "in_fp8"), [(False, 0, False), (True, 0, False), (True, 2, False), (False, 0, True), (True, 0, True)]
)
def test_packs_of_one_shape_learn_the_same_and_are_compiled_once(kernel, plain, compiled: bool, recompute: int, in_fp8: bool) -> None:
    """With the frozen weights in fp8 what is learnt is pulled the same way but for their rounding."""
    run = Run(ENGINE, compiled, recompute, in_fp8)
    assert max(abs(a - b) for a, b in zip(run.losses, plain.losses, strict=True)) < (3e-2 if in_fp8 else 3e-3)
    assert float(torch.nn.functional.cosine_similarity(run.gradient, plain.gradient, 0)) > (0.98 if in_fp8 else 0.999)
    if compiled:
        assert 0 < run.graphs[0] <= (4 if recompute else 2), run.graphs
        assert run.graphs[-1] == run.graphs[0], f"compiled again for another pack: {run.graphs}"


@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(2, 300), min_size=1, max_size=200),
    budget=st.integers(50, 1200),
    seed=st.integers(0, 5),
)  # fmt: skip
def test_every_pack_fits_the_one_table(lengths: list[int], budget: int, seed: int) -> None:
    """Places enough for the documents and the filling, every piece within the longest, ends that rise to the frame's tokens. Rows that
    are longer than the budget do not make the others' packs any larger."""
    frames = frames_of(lengths, budget)
    for pack in plan(lengths, budget, seed=seed, epoch=0, most=frames[0].max_sequences()):
        own = [lengths[row] for row in pack]
        frame = frame_for(frames, sum(own))
        assert frame is not None and (frame is frames[0] or frames[0].tokens < sum(own)), "a pack is filled up further than it must be"
        filled = own + frame.filling(own)
        assert sum(filled) == frame.tokens and max(filled) <= frame.longest and min(filled) > 0
        given = packed_arguments(filled, CPU, frame)
        ends, spans = given["cu_seq_lens"], given["cu_seq_lens"].diff()
        assert ends.shape == (frame.sequences + 1,) and ends.dtype == torch.int32 and given["longest"].shape[0] == max(filled)
        assert spans.tolist() == filled + [0] * (frame.sequences - len(filled))


def test_one_long_row_does_not_fill_every_pack_up() -> None:
    """60 rows of 100 tokens and one of 8,192 in packs of 2,048: filled up to the longest, three quarters of every pass were padding."""
    lengths = [100] * 60 + [8192]
    frames = frames_of(lengths, 2048)
    packs = plan(lengths, 2048, seed=1, epoch=0, most=frames[0].max_sequences())
    computed = sum(frame_for(frames, sum(lengths[row] for row in pack)).tokens for pack in packs)
    assert sum(lengths) / computed > 0.9 and [frame.tokens for frame in frames] == [2048, 8192]
    assert frames_of([100] * 60, 2048) == [frame_of([100] * 60, 2048)]


def test_the_kernel_is_told_the_longest_row_of_the_pack(kernel: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not of the job: it launches a block for each 128 tokens of it, for every place of the table. Blocks are not compiled again
    for another length."""
    told: list[int] = []
    real = packed_attention.varlen_attn

    def attention(q, k, v, ends, _, longest, __, **named):  # type: ignore[no-untyped-def]
        told.append(longest)
        return real(q, k, v, ends, ends, longest, longest, **named)

    monkeypatch.setattr(packed_attention, "varlen_attn", attention)
    Run(ENGINE, compiled=False)
    packs = plan(DATA.lengths, BUDGET, seed=1, epoch=0, most=frame_of(DATA.lengths, BUDGET).max_sequences())[:4]
    own = [max(DATA.lengths[row] for row in pack) for pack in packs]
    assert told == [n for n in own for _ in range(3)] and len(set(own)) > 2 and min(own) < 0.6 * max(DATA.lengths)


def grid(lengths: list[int], tokens: int, own: bool, heads: int = 32) -> int:
    """Blocks of one call of FlashAttention-2, by the mean over packs."""
    frame, counts = frame_of(lengths, tokens), []
    for pack in plan(lengths, tokens, seed=1, epoch=0, most=frame.max_sequences()):
        sizes = [lengths[row] for row in pack]
        longest = max(sizes + frame.filling(sizes)) if own else frame.longest
        counts.append(frame.sequences * -(-longest // 128) * heads)
    return round(sum(counts) / len(counts))


def test_one_long_row_does_not_have_all_packs_launch_blocks_for_it() -> None:
    lengths = [min(400, max(16, int(70 * 2.7 ** random.Random(i).gauss(0, 0.5)))) for i in range(4000)] + [4096]
    assert grid(lengths, 16_384, own=False) > 400_000 and grid(lengths, 16_384, own=True) < 80_000


def test_a_pack_with_more_documents_than_places_is_refused() -> None:
    with pytest.raises(ValueError, match="5 sequences in a pack with 4 places"):
        packed_arguments([2] * 5, CPU, PackShape(64, 4, 64))


def test_a_filled_batch_has_one_shape_and_the_loss_of_its_rows() -> None:
    """What fills a pack up is no target, so that neither the loss nor a gradient hears of it."""
    frame = frame_of(DATA.lengths, BUDGET)
    rows = plan(DATA.lengths, BUDGET, seed=1, epoch=0, most=frame.max_sequences())[0]
    filled, bare = make_batch(DATA, rows, CPU, frame), make_batch(DATA, rows, CPU)
    assert filled.input_ids.shape == filled.position_ids.shape == (1, frame.tokens)
    assert len(filled.targets) % LEARNT_MULTIPLE == 0 and (filled.tokens, filled.trained) == (bare.tokens, bare.trained)
    assert torch.equal(filled.targets[: bare.trained], bare.targets) and set(filled.targets[bare.trained :].tolist()) == {NOT_LEARNT}
    torch.manual_seed(0)
    head = torch.randn(300, 16, requires_grad=True)
    hidden, found = torch.randn(frame.tokens, 16), []
    for batch in (filled, bare):
        state = hidden.clone().requires_grad_()
        head.grad = None
        loss = linear_cross_entropy(state.index_select(0, batch.sources), head_of_tensor(head), batch.targets)
        loss.backward()
        found.append((loss, state.grad, head.grad))
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


def head_of_tensor(weight: torch.Tensor):
    from worker.modeling.cross_entropy import Head

    return Head(weight, None)
