"""Captured decoding steps, without a GPU, on a tape."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch

from app.inference.protocol import Sampling
from tests.tape import Tape
from tests.worker.inference.test_engine import PROMPTS, crowd, home, make_adapter, ref_of, request, run  # noqa: F401  # home is a fixture
from worker import kernels
from worker.inference import next_token
from worker.inference.decode_graph import DecodeGraphs
from worker.inference.engine import Engine
from worker.inference.model_pool import ModelPool
from worker.inference.next_token import NextTokenQuery
from worker.inference.sampling import Sampler


class Taped(ModelPool):
    """A pool whose models decode as on a GPU."""

    tapes: list[Tape]

    def _as_lane(self, *given: Any) -> Any:
        lane = super()._as_lane(*given)
        self.tapes = getattr(self, "tapes", [])

        def record(run: Any) -> Tape:
            self.tapes.append(Tape(run))
            return self.tapes[-1]

        lane.graphs = DecodeGraphs(lane.device, record)
        return lane


@pytest.fixture
def engines(home, monkeypatch):  # noqa: F811
    monkeypatch.setattr(kernels, "allowed", lambda: False)  # one for the CPU is no operation of torch's, and not on the tape
    plain, taped = Engine(ModelPool(device="cpu")), Engine(Taped(device="cpu"))
    yield plain, taped
    plain.close(), taped.close()
    gc.collect()


@pytest.mark.long
def test_replayed_steps_give_the_same_answers(engines, home):  # noqa: F811
    """Alone and in a crowd, with slots that are outgrown (256 tokens) and answers that end at different times."""
    plain, taped = engines
    ref = ref_of(home)
    lengths = (40, 300, 24, 90, 280, 12)
    asked = [request(ref, p, seed=i, owner=i, max_tokens=n) for i, (p, n) in enumerate(zip(PROMPTS, lengths, strict=True))]
    wanted = [run(plain, one)[0] for one in asked]
    assert [run(taped, one)[0] for one in asked] == wanted
    assert crowd(taped, asked) == wanted
    replays = sum(tape.replays for tape in taped.shelf.tapes)
    assert replays > 0.6 * taped.steps > 5 * len(taped.shelf.tapes), "hardly a step was replayed"


@pytest.mark.long
def test_adapters_that_come_and_go_are_captured_anew(engines, home, tmp_path, tiny_model):  # noqa: F811
    plain, taped = engines
    refs = [ref_of(home, adapters=adapters) for adapters in ([], [make_adapter(tmp_path / "a", tiny_model, 1)])]
    refs.append(ref_of(home, adapters=[make_adapter(tmp_path / "b", tiny_model, 2, rank=8)]))
    asked = [request(ref, prompt, owner=i) for i, prompt in enumerate(PROMPTS[:3]) for ref in refs]
    wanted = [run(plain, one)[0] for one in asked]
    assert len({str(answer) for answer in wanted}) > len(PROMPTS[:3])
    assert [run(taped, one)[0] for one in asked] == wanted
    assert crowd(taped, asked) == wanted


def test_what_cannot_be_captured_is_computed_as_it_is(engines, home, caplog):  # noqa: F811
    plain, taped = engines

    def refuse(run: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    ref = ref_of(home)
    place = taped.shelf.place(ref)
    place.lane.graphs.graph = refuse
    assert run(taped, request(ref, PROMPTS[1]))[0] == run(plain, request(ref, PROMPTS[1]))[0]
    assert caplog.text.count("not captured") == 1 and place.lane.graphs.failed


def test_what_the_cache_gives_up_is_free_though_a_graph_was_captured_with_it(engines, home):  # noqa: F811
    """At once: a collection of garbage comes whenever it comes, and the next model needs the memory now."""
    _, taped = engines
    run(taped, request(ref_of(home), PROMPTS[1]))
    (lane,) = taped.shelf.lanes.values()
    keys = weakref.ref(next(iter(lane.cache.blocks.values())).layers[0][0])
    assert taped.shelf.tapes[0].replays > 5 and keys() is not None
    taped.shelf.tapes[0].done.clear()
    gc.disable()
    try:
        lane.cache.trim()
        assert keys() is None and any(lane.graphs.known.values())
    finally:
        gc.enable()


SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0, "frequency_penalty": 0.3, "repetition_penalty": 1.3},
    {"temperature": 1.0, "top_p": 1.0},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 1.4, "top_k": 300, "top_p": 0.99},
    {"temperature": 2.0, "top_p": 0.999},
    {"temperature": 0.5, "min_p": 0.1, "top_p": 1.0, "logit_bias": {3: 4.0, 7: -90.0}},
    {"temperature": 1e-5, "presence_penalty": -1.0},
]


@pytest.mark.parametrize("spread", [0.01, 1.0, 8.0])
def test_sampling_read_in_one_copy_chooses_the_same_tokens(spread):
    """For all settings at once, steep and flat distributions, and with the same log-probabilities."""
    torch.manual_seed(3)
    plain, ahead = ([Sampler(Sampling(**s), i, [1, 2, 3]) for i, s in enumerate(SETTINGS)] for _ in range(2))
    for _ in range(20):
        logits = torch.randn(len(SETTINGS) + 1, 3000) * spread
        logits[-1, 5] = torch.nan
        read = next_token.read_ahead(
            logits, [NextTokenQuery(i, s, 3) for i, s in enumerate(ahead)] + [NextTokenQuery(len(SETTINGS), None, None)]
        )
        assert read[-1].likeliest is None and read[0].likeliest == int(logits[0].argmax())
        for i, (mine, theirs) in enumerate(zip(plain, ahead, strict=True)):
            token = mine.choose(logits[i])
            assert read[i].sampled(theirs) == token, SETTINGS[i]
            logs = logits[i].log_softmax(0)
            said = read[i].logprob(Words(), token, 2)
            assert said.logprob == pytest.approx(float(logs[token]), abs=1e-5)
            assert [t.logprob for t in said.top] == pytest.approx(logs.topk(2).values.tolist(), abs=1e-5)


class Words:
    """A tokenizer whose tokens are their numbers."""

    def decode(self, ids: list[int], **_: Any) -> str:
        return str(ids[0])

    def convert_ids_to_tokens(self, token: int) -> str:
        return str(token)
