"""Packs of pairs and of labelled texts padded to one shape, as a GPU has them: the same figures, and blocks that are compiled once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from tests.worker.training.test_dpo import numbered, pair_rows
from tests.worker.training.test_step_shapes import CPU, ENGINE, PLAIN, _settings, kernel  # noqa: F401
from worker.data.batching import Row
from worker.data.packing import plan
from worker.data.preference_pairs import tokenise_pairs
from worker.modeling import fused_layers, packed_attention
from worker.modeling.classifier import Classifier
from worker.modeling.packed_attention import frame_for, frames_of
from worker.training.objectives.classification import pack_of, tokenise_texts
from worker.training.objectives.dpo import log_likelihoods, pair_batch

BUDGET = 256


def packs_of(lengths: list[int], per_row: int) -> tuple[Any, list[list[int]]]:
    frames = frames_of(lengths, BUDGET, per_row)
    packs = plan(lengths, BUDGET, seed=1, epoch=0, most=frames[0].max_sequences() // per_row)
    assert len({len(pack) for pack in packs}) > 1, "all packs hold the same number of rows, so nothing is shown"
    return frames, packs


def passed(model: torch.nn.Module, pack_loss: Any, packs: list[list[int]]) -> tuple[list[float], torch.Tensor]:
    """The loss of each pack, and the gradient of all."""
    model.zero_grad()
    losses = []
    for pack in packs:
        loss = pack_loss(pack)
        loss.backward()
        losses.append(loss.item())
    return losses, torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])


def compared(
    monkeypatch: pytest.MonkeyPatch, model: torch.nn.Module, body: torch.nn.Module, framed: Any, plain: Any, packs: list[list[int]]
) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    expected, gradient = passed(model, plain, packs)
    monkeypatch.setattr(fused_layers, "_compiled", False)
    fused_layers.compile_blocks(body, counter)
    torch._dynamo.config.suppress_errors = False
    first = framed(packs[0])
    first.backward()
    graphs = counter.frame_count
    losses, own = passed(model, framed, packs)
    assert losses == pytest.approx(expected, rel=2e-2)
    assert float(torch.nn.functional.cosine_similarity(own, gradient, 0)) > 0.999
    assert 0 < graphs <= 2 and counter.frame_count == graphs, "compiled again for another pack"


def test_pairs(kernel: None, monkeypatch: pytest.MonkeyPatch, tiny_model: Path) -> None:  # noqa: F811
    data = tokenise_pairs(AutoTokenizer.from_pretrained(tiny_model), numbered(pair_rows(24)), "dialogue", 96)
    frames, packs = packs_of(data.pairs.lengths, 2)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation=packed_attention.NAME, dtype=torch.bfloat16)

    def framed(pack: list[int]) -> torch.Tensor:
        given = pair_batch(data, pack, CPU, frame_for(frames, sum(data.pairs.lengths[row] for row in pack)))
        assert given.batch.input_ids.shape[1] == frames[0].tokens
        return -log_likelihoods(model, given, ENGINE)[0].sum()

    def plain(pack: list[int]) -> torch.Tensor:
        return -log_likelihoods(model, pair_batch(data, pack, CPU), PLAIN)[0].sum()

    compared(monkeypatch, model, model, framed, plain, packs)


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_labelled_texts(kernel: None, monkeypatch: pytest.MonkeyPatch, tiny_model: Path, pooling: Any) -> None:  # noqa: F811
    rows = [
        Row(i, {"text": row["messages"][0]["content"] + " " + row["chosen"][0]["content"], "label": str(i % 3)})
        for i, row in enumerate(pair_rows(40))
    ]
    data = tokenise_texts(AutoTokenizer.from_pretrained(tiny_model), rows, 96)
    frames, packs = packs_of(data.lengths, 1)
    torch.manual_seed(0)
    body = AutoModel.from_pretrained(tiny_model, attn_implementation=packed_attention.NAME, dtype=torch.bfloat16)
    model = Classifier(body, torch.nn.Linear(body.config.hidden_size, 3), pooling)
    truth = torch.tensor([i % 3 for i in range(40)])

    def loss(pack: list[int], engine: Any, frame: Any) -> torch.Tensor:
        inputs, lengths = pack_of(data, pack, CPU, frame)
        assert frame is None or inputs["input_ids"].shape[1] == frame.tokens
        with engine.autocast():
            scores = model(**inputs, lengths=lengths)
        return torch.nn.functional.cross_entropy(scores.float(), truth[pack], reduction="sum")

    def framed(pack: list[int]) -> torch.Tensor:
        return loss(pack, ENGINE, frame_for(frames, sum(data.lengths[row] for row in pack)))

    compared(monkeypatch, model, body, framed, lambda pack: loss(pack, PLAIN, None), packs)
