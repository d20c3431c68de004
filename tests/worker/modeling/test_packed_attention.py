"""Packed training equals training row by row, and no row sees another."""

from __future__ import annotations

import json
import types
import uuid

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from app.models.integrity import BadModel
from app.shapes import shape_of
from app.spec import ModelRef
from tests.worker.orders import chat_rows
from worker.data.batching import Row, Tokenised, make_batch, tokenise
from worker.modeling import fused_layers, packed_attention
from worker.modeling.cross_entropy import head_of, linear_cross_entropy, score

CPU = torch.device("cpu")


def data_of(tokenizer, count: int = 7) -> Tokenised:
    return tokenise(tokenizer, [Row(i, row) for i, row in enumerate(chat_rows(count), 1)], "dialogue", 64)


def packed_loss(model, data: Tokenised, rows: list[int]) -> torch.Tensor:
    batch = make_batch(data, rows, CPU)
    hidden = model.get_decoder()(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, **batch.arguments)
    return linear_cross_entropy(hidden.last_hidden_state[0].index_select(0, batch.sources), head_of(model), batch.targets) / batch.trained


def padded_loss(model, data: Tokenised, rows: list[int]) -> torch.Tensor:
    """What everyone does: rows padded on the right, a mask, and labels of -100 where nothing is learnt."""
    longest = max(data.lengths)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for place, row in enumerate(rows):
        span = slice(data.starts[row], data.starts[row + 1])
        length = data.lengths[row]
        ids[place, :length] = torch.from_numpy(data.ids[span].astype("int64"))
        mask[place, :length] = 1
        labels[place, :length] = torch.where(torch.from_numpy(data.trained[span]), ids[place, :length], -100)
    return model(input_ids=ids, attention_mask=mask, labels=labels).loss


@pytest.mark.parametrize("norms", [False, True])
def test_packed_loss_and_gradients_equal_the_padded_batch(network, tiny_model, tokenizer, norms: bool) -> None:
    data, rows = data_of(tokenizer), list(range(7))
    reference = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation="eager")
    if norms:
        assert fused_layers.patch_norms(network) == 2 * network.config.num_hidden_layers + 1
    packed, padded = packed_loss(network, data, rows), padded_loss(reference, data, rows)
    packed.backward()
    padded.backward()
    assert packed.item() == pytest.approx(padded.item(), abs=1e-5)
    for (name, ours), theirs in zip(network.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-4, msg=name)


def test_a_row_does_not_see_the_one_before(network, tokenizer) -> None:
    data = data_of(tokenizer)

    def second(first: int) -> torch.Tensor:
        batch = make_batch(data, [first, 3], CPU)
        out = network.get_decoder()(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, **batch.arguments)
        return out.last_hidden_state[0, data.lengths[first] : data.lengths[first] + data.lengths[3]]

    with torch.no_grad():
        torch.testing.assert_close(second(0), second(5), atol=1e-6, rtol=0)


def test_recomputed_layers_give_the_same_gradients(network, tiny_model, tokenizer) -> None:
    data, rows = data_of(tokenizer), [0, 1, 2]
    again = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation=packed_attention.NAME).train()
    assert fused_layers.recompute_layers(again, 1) == 1
    packed_loss(network, data, rows).backward()
    packed_loss(again, data, rows).backward()
    for ours, theirs in zip(network.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("window", "softcap"), [(4, None), (None, 20.0), (4, 20.0)])
def test_window_and_soft_cap(window: int | None, softcap: float | None) -> None:
    """Against the formula written out, with fewer key heads than query heads."""
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, 12, 8), torch.randn(1, 2, 12, 8), torch.randn(1, 2, 12, 8)
    out, _ = packed_attention.packed_attention(
        torch.nn.Module(), q, k, v, None, scaling=0.3, sliding_window=window, softcap=softcap, sequence_lengths=[5, 7]
    )
    for start, end in ((0, 5), (5, 12)):
        for i in range(start, end):
            seen = range(max(start, i - window + 1) if window else start, i + 1)
            for head in range(4):
                scores = torch.stack([q[0, head, i] @ k[0, head // 2, j] * 0.3 for j in seen])
                scores = torch.tanh(scores / softcap) * softcap if softcap else scores
                wanted = scores.softmax(0) @ v[0, head // 2, list(seen)]
                torch.testing.assert_close(out[0, i, head], wanted, atol=1e-5, rtol=1e-4)


def test_what_the_attention_does_not_know_is_refused() -> None:
    """Such as the attention sinks of gpt-oss: without them the model would silently compute something else."""
    x = torch.randn(1, 2, 12, 8)
    given = {"position_ids": torch.arange(12)[None], "use_cache": False, "s_aux": None, "sequence_lengths": [12]}
    packed_attention.packed_attention(torch.nn.Module(), x, x, x, None, **given)
    with pytest.raises(BadModel, match="its attention takes s_aux"):
        packed_attention.packed_attention(torch.nn.Module(), x, x, x, None, **{**given, "s_aux": torch.zeros(2)})
    ends = torch.tensor([0, 12], dtype=torch.int32)
    with pytest.raises(BadModel, match="caps the scores"):
        packed_attention.packed_attention(torch.nn.Module(), x, x, x, None, softcap=20.0, cu_seq_lens=ends, longest=12)


@pytest.mark.parametrize(("scale", "cap"), [(1.0, None), (0.5, 3.0)])
def test_chunked_loss_equals_the_plain_one(monkeypatch: pytest.MonkeyPatch, scale: float, cap: float | None) -> None:
    from worker.modeling import cross_entropy

    monkeypatch.setattr(cross_entropy, "chunk_rows", lambda *_: 5)
    monkeypatch.setattr(cross_entropy, "BLOCK_BYTES", 4 * 11 * 2)  # two rows
    torch.manual_seed(0)
    hidden, weight, bias = (torch.randn(*s, requires_grad=True) for s in ((17, 6), (11, 6), (11,)))
    targets = torch.randint(0, 11, (17,))
    ours = linear_cross_entropy(hidden, cross_entropy.Head(weight, bias, scale, cap), targets)
    ours.mul(0.25).backward()
    grads = [t.grad.clone() for t in (hidden, weight, bias)]
    for t in (hidden, weight, bias):
        t.grad = None
    logits = torch.nn.functional.linear(hidden, weight, bias) * scale
    logits = torch.tanh(logits / cap) * cap if cap else logits
    plain = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    plain.mul(0.25).backward()
    torch.testing.assert_close(ours, plain)
    for ours_grad, t in zip(grads, (hidden, weight, bias), strict=True):
        torch.testing.assert_close(ours_grad, t.grad, atol=1e-5, rtol=1e-4)
    each, hits = score(hidden, cross_entropy.Head(weight, bias, scale, cap), targets)
    torch.testing.assert_close(each.sum(), plain)
    assert torch.equal(hits, logits.argmax(1) == targets)


def test_chunks_of_logits_stay_within_their_memory() -> None:
    """On a GPU a gibibyte whatever is alive for each logit; a narrow type there gains no longer chunks than float32."""
    from worker.modeling.cross_entropy import CHUNK_BYTES, CHUNK_BYTES_GPU, chunk_rows

    for width in (2, 4, 12):
        assert 0.99 < chunk_rows(128_256, 10**6, True, width) * max(width, 4) * 128_256 / CHUNK_BYTES_GPU <= 1
        assert 0.9 < chunk_rows(49_152, 10**6, False, width) * width * 49_152 / CHUNK_BYTES <= 1
    assert chunk_rows(128_256, 100, True, 4) == 100 and chunk_rows(10**9, 100, True, 4) == 16


def test_a_loss_in_bf16_rounds_its_products_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and gradients of a head in bf16 are those of float32 within the rounding of the products, block by block."""
    from worker.modeling import cross_entropy

    monkeypatch.setattr(cross_entropy, "chunk_rows", lambda *_: 7)
    monkeypatch.setattr(cross_entropy, "BLOCK_BYTES", 4 * 50 * 3)
    torch.manual_seed(0)
    hidden, weight = torch.randn(23, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True)
    targets = torch.randint(0, 50, (23,))
    found = {}
    for kind in (torch.float32, torch.bfloat16):
        hidden.grad = weight.grad = None
        linear_cross_entropy(hidden, cross_entropy.Head(weight, None), targets, kind).backward()
        found[kind] = (hidden.grad, weight.grad, score(hidden, cross_entropy.Head(weight, None), targets, kind)[0])
    for wide, half in zip(found[torch.float32], found[torch.bfloat16], strict=True):
        assert torch.nn.functional.cosine_similarity(wide.flatten(), half.flatten(), 0) > 0.9995


ENCODER = {
    "vocab_size": 120, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "max_position_embeddings": 40,
}  # fmt: skip


@pytest.mark.parametrize("kind", ["bert", "roberta", "xlm-roberta"])
def test_packed_texts_equal_the_padded_batch_in_encoders(data_dir, kind: str) -> None:
    """Each as its makers run it: padded, with a mask, and positions of its own counting."""
    from worker.modeling.classifier import Classifier, load_backbone

    torch.manual_seed(3)
    folder = data_dir / "models" / kind
    made = AutoModel.from_config(AutoConfig.for_model(kind, **ENCODER, pad_token_id=1), attn_implementation="eager").eval()
    made.embeddings.position_embeddings.weight.data.mul_(50)  # so that a wrong place shows
    made.save_pretrained(folder)
    reference = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    shape = shape_of(json.loads((folder / "config.json").read_text()))
    assert shape.positions == (40 if kind == "bert" else 38)
    assert shape.parameters() == sum(p.numel() for p in made.parameters())
    ref = ModelRef(id=uuid.uuid4(), name=kind, kind="encoder", path=f"models/{kind}", revision="0", shape=shape)
    ours = Classifier(load_backbone(ref, attention=packed_attention.NAME), torch.nn.Identity(), "mean")

    lengths = [5, shape.positions, 3]
    rows = [torch.randint(3, 120, (n,)) for n in lengths]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=1)
    with torch.no_grad():
        states = reference(input_ids=ids, attention_mask=(ids != 1).long()).last_hidden_state
        wanted = torch.stack([states[i, :n].mean(0) for i, n in enumerate(lengths)])
        places = torch.cat([torch.arange(n) for n in lengths])[None]
        found = ours.pooled(torch.cat(rows)[None], places, lengths, **packed_attention.packed_arguments(lengths, CPU))
    torch.testing.assert_close(found, wanted, atol=2e-6, rtol=1e-5)


def test_a_model_with_an_attention_of_its_own_is_refused(data_dir) -> None:
    """MPNet computes its attention itself, so the texts of a pack would see each other."""
    from worker.modeling.classifier import load_backbone
    from worker.modeling.loading import BadModel

    folder = data_dir / "models" / "mpnet"
    AutoModel.from_config(AutoConfig.for_model("mpnet", **ENCODER)).save_pretrained(folder)
    shape = shape_of(json.loads((folder / "config.json").read_text()))
    ref = ModelRef(id=uuid.uuid4(), name="mpnet", kind="encoder", path="models/mpnet", revision="0", shape=shape)
    assert load_backbone(ref, attention="eager")
    with pytest.raises(BadModel, match="rows cannot be packed"):
        load_backbone(ref, attention=packed_attention.NAME)


def test_recurrent_layers_are_no_attention() -> None:
    class Hybrid:
        _supports_attention_backend = True
        config = types.SimpleNamespace(layer_types=["linear_attention", "full_attention"])

    assert not packed_attention.packs(Hybrid())
    Hybrid.config.layer_types = ["sliding_attention", "full_attention"]
    assert packed_attention.packs(Hybrid())


@pytest.mark.parametrize("short", [0, 16, 2**30])
def test_bf16_attention_is_right_whichever_way_a_length_is_computed(monkeypatch, short: int) -> None:
    """Short sequences go through float32 and long ones through bf16; values and gradients stay within bf16's rounding."""
    monkeypatch.setattr(packed_attention, "SHORT", short)
    torch.manual_seed(0)
    lengths = [5, 40, 1, 20]
    wide = [torch.randn(1, heads, sum(lengths), 16, requires_grad=True) for heads in (4, 2, 2)]
    half = [x.detach().bfloat16().requires_grad_() for x in wide]
    module = types.SimpleNamespace(is_causal=True)
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = packed_attention.packed_attention(module, *half, None, sequence_lengths=lengths)
    expected, _ = packed_attention.packed_attention(module, *wide, None, sequence_lengths=lengths)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, atol=3e-2, rtol=3e-2)
    out.float().square().sum().backward()
    expected.square().sum().backward()
    for ours, theirs in zip(half, wide, strict=True):
        torch.testing.assert_close(ours.grad.float(), theirs.grad, atol=0.15, rtol=0.1)


@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.bfloat16])
def test_the_norm_and_its_gradients_are_those_of_the_formula(kind: torch.dtype) -> None:
    from worker.kernels.cpu.rms_norm import rms_norm

    torch.manual_seed(0)
    x, weight = torch.randn(2, 5, 24, dtype=torch.float64), torch.randn(24, dtype=torch.float64)
    own = [t.to(kind).requires_grad_() for t in (x, weight)]
    plain = [t.detach().double().requires_grad_() for t in own]
    pull = torch.randn(2, 5, 24, dtype=torch.float64).to(kind)
    ours = rms_norm(*own, 1e-5, kind)
    ours.backward(pull)
    expected = plain[0] * torch.rsqrt(plain[0].square().mean(-1, keepdim=True) + 1e-5) * plain[1]
    expected.backward(pull.double())
    close = (
        {"atol": 1e-9, "rtol": 1e-9}
        if kind == torch.float64
        else {"atol": 2e-6, "rtol": 1e-5}
        if kind == torch.float32
        else {"atol": 0.05, "rtol": 0.02}
    )
    torch.testing.assert_close(ours.double(), expected, **close)
    for mine, theirs in zip(own, plain, strict=True):
        torch.testing.assert_close(mine.grad.double(), theirs.grad, **close)


@pytest.mark.parametrize(("does", "repeats"), [("takes them", False), ("refuses", True), ("mistakes them", True)])
def test_grouped_heads_are_probed_where_torch_says_nothing_of_them(monkeypatch, does: str, repeats: bool):
    """An attention without the argument `enable_gqa`, as torch's before 2.12: keys and values are copied only where they must be."""
    heads: list[int] = []

    def attention(q, k, v, ends, _, max_q, max_k, *, scale=None, window_size=(-1, -1)):
        heads.append(k.shape[1])
        if q.shape[1] != k.shape[1]:
            if does == "refuses":
                raise RuntimeError("Number of heads in key/value must divide number of heads in query")
            turns = (q.shape[1] // k.shape[1], 1)
            k, v = (x.repeat_interleave(turns[0], 1) if does == "takes them" else x.repeat(1, *turns) for x in (k, v))
        pieces = []
        for start, end in zip(ends.tolist(), ends.tolist()[1:], strict=False):
            one = [x[None, start:end].transpose(1, 2) for x in (q, k, v)]
            pieces.append(torch.nn.functional.scaled_dot_product_attention(*one, is_causal=True, scale=scale)[0].transpose(0, 1))
        return torch.cat(pieces)

    monkeypatch.setattr(packed_attention, "varlen_attn", attention)
    monkeypatch.setattr(packed_attention, "_GROUPED", {})
    monkeypatch.setattr(packed_attention, "_repeats", True)
    assert packed_attention.probe_grouped_heads(CPU) is not repeats
    heads.clear()
    q, k, v = (torch.randn(1, n, 32, 32, dtype=torch.bfloat16) for n in (4, 2, 2))
    ends = torch.tensor([0, 12, 32], dtype=torch.int32)
    out, _ = packed_attention.packed_attention(torch.nn.Module(), q, k, v, None, cu_seq_lens=ends, longest=20)
    assert heads == [4 if repeats else 2]
    wanted, _ = packed_attention.packed_attention(torch.nn.Module(), *(x.float() for x in (q, k, v)), None, sequence_lengths=[12, 20])
    torch.testing.assert_close(out.float(), wanted, rtol=0.02, atol=0.02)
