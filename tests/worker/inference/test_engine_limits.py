"""The engine when it is full, short of memory or given what breaks: each request gets its share or a clear error, the others go on."""

from __future__ import annotations

import ctypes
import gc
import os
import threading
import time

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from app.errors import DoesNotFit, TooMany, Unavailable
from tests.conftest import wait_until
from tests.worker.inference.test_engine import PROMPTS, by_transformers, crowd, home, make_adapter, ref_of, request, run  # noqa: F401
from worker.inference import engine as engine_module
from worker.inference import task as inference_task
from worker.inference.engine import Engine
from worker.inference.model_pool import ModelPool
from worker.inference.sampling import Sampler
from worker.modeling import kv_cache
from worker.modeling.loading import BadModel

ENDLESS = {"logit_bias": {70: 100}}


@pytest.fixture
def small(home):  # noqa: F811
    """Engines of four rows."""
    made = []

    def make(memory_bytes=None, **more):
        made.append(Engine(ModelPool(memory_bytes=memory_bytes, device="cpu"), **{"most_rows": 4, "chunk": 8, "lone_chunk": 8} | more))
        return made[-1]

    yield make
    for one in made:
        one.close()
    gc.collect()


def last_of(engine, asked):
    return [entry for entries in engine.answer(asked) for entry in entries][-1]


def soon(condition):
    """Wait for what lasts only for moments."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def in_thread(work):
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def test_more_answers_than_rows_come_one_after_the_other(small, home):  # noqa: F811
    """Sixteen answers to one prompt through four rows are those that sixteen rows give, and another person is answered between."""
    asked = request(ref_of(home), PROMPTS[3], seed=7, n=16, temperature=1.0, max_tokens=30)
    wide = small(most_rows=16)
    expected = run(wide, asked)[0]
    assert len(set(expected)) == 16
    narrow, found = small(), {}
    thread = in_thread(lambda: found.update(all=run(narrow, asked)[0]))
    wait_until(lambda: narrow.active or found, what="the first row", seconds=10)
    run(narrow, request(ref_of(home), "x", owner=1, max_tokens=3))
    assert "all" not in found, "it waited for all sixteen"
    thread.join(60)
    assert found["all"] == expected and not narrow.active


@pytest.mark.long
def test_a_long_run_leaves_room_for_a_chat_of_the_same_person(small, home):  # noqa: F811
    engine, ref = small(), ref_of(home)
    rows = [request(ref, p, max_tokens=300, **ENDLESS).model_copy(update={"bulk": True}) for p in PROMPTS]
    threads = [in_thread(lambda r=r: run(engine, r)) for r in rows]
    wait_until(lambda: len(engine.active) == 2 and len(engine.waiting) == 4, what="the run", seconds=10)
    texts, _, done = run(engine, request(ref, PROMPTS[0], max_tokens=8))
    assert done.completion_tokens and texts and len(engine.active) == 2, "the chat waited for the run, or the run took more than half"
    for thread in threads:
        thread.join(60)


def test_a_long_prompt_neither_starves_a_short_one_nor_is_starved(small, home):  # noqa: F811
    engine, ref, ends = small(), ref_of(home), {}
    long = request(ref, "wood and " * 100, max_tokens=1)
    thread = in_thread(lambda: (run(engine, long), ends.update(long=time.monotonic())))
    soon(lambda: engine.active)
    reading = engine.active[0]
    run(engine, request(ref, "x", owner=1, max_tokens=1))
    assert reading.read < len(reading.prompt) / 2 and "long" not in ends
    chats = [in_thread(lambda i=i: [run(engine, request(ref, "x", owner=2 + i, max_tokens=40)) for _ in range(4)]) for i in range(3)]
    thread.join(60)
    assert "long" in ends
    for chat in chats:
        chat.join(60)


def test_who_waits_too_long_is_told_to_come_again(small, home, monkeypatch):  # noqa: F811
    engine, ref = small(most_rows=1, wait_seconds=0.05), ref_of(home)
    talk = engine.answer(request(ref, "x", max_tokens=500, **ENDLESS))
    next(talk), next(talk)
    last = last_of(engine, request(ref, "y", owner=1))
    assert (last.type, last.status, last.code) == ("error", 503, "busy") and "waited" in last.message and last.hint
    monkeypatch.setattr(engine_module, "MAX_OF_ONE", 1)
    with pytest.raises(TooMany):
        next(engine.answer(request(ref, "y")))
    next(engine.answer(request(ref, "y", owner=2)))
    talk.close()
    assert all(lane.users == 0 for lane in engine.shelf.lanes.values())


def test_long_runs_of_several_answers_do_not_wait_for_each_other(small, home):  # noqa: F811
    """Half of four rows is for long runs: two prompts whose first answers have ended hold both, and the others must come after them."""
    engine, ref = small(), ref_of(home)
    asked = [request(ref, prompt, seed=i, owner=1, n=3, max_tokens=4) for i, prompt in enumerate(PROMPTS)]
    told = crowd(engine, [one.model_copy(update={"bulk": True}) for one in asked])
    alone = [run(engine, one.model_copy(update={"sampling": one.sampling.model_copy(update={"n": 1})}))[0][0] for one in asked]
    assert told == [[text] * 3 for text in alone]
    assert not any(slot.busy for lane in engine.shelf.lanes.values() for slot in lane.cache.slots())


def test_an_answer_moves_to_a_larger_block_as_it_grows(small, home, monkeypatch):  # noqa: F811
    monkeypatch.setattr(kv_cache, "MIN_TOKENS", 16)
    ref = ref_of(home)
    expected = [[by_transformers(home / "models/tiny", prompt)] for prompt in PROMPTS]
    engine = small(most_rows=8)
    assert crowd(engine, [request(ref, prompt, owner=i) for i, prompt in enumerate(PROMPTS)]) == expected
    (lane,) = engine.shelf.lanes.values()
    assert set(lane.cache.blocks) >= {16, 64} and not any(slot.busy for slot in lane.cache.slots())


def test_memory_is_promised_before_it_is_taken(small, home, monkeypatch):  # noqa: F811
    """Room for the weights and five blocks of 64 tokens: what can never fit is refused, the rest waits for its turn."""
    monkeypatch.setattr(kv_cache, "MIN_TOKENS", 64)
    ref = ref_of(home)
    each = 64 * 2 * ref.shape.layers * ref.shape.kv_heads * ref.shape.head_dim * 4
    engine = small(most_rows=8)
    run(engine, request(ref, "x", max_tokens=1))
    (lane,) = engine.shelf.lanes.values()
    lane.cache.trim()
    engine.shelf.memory_bytes = lane.weight_bytes + 5 * each
    with pytest.raises(DoesNotFit, match="answer of up to 500 needs") as caught:
        run(engine, request(ref, "x", max_tokens=500))
    assert caught.value.param == "max_tokens" and lane.cache.nbytes() == 0
    started = next(engine.answer(request(ref, "x", max_tokens=None)))[0]
    assert started.max_tokens + started.prompt_tokens <= 256, "nobody said how long, so it is as long as there is memory for"
    seen, forward = [], type(lane).forward
    monkeypatch.setattr(type(lane), "forward", lambda self, *a: (seen.append(engine.shelf.memory()), forward(self, *a))[1])
    asked = [request(ref, p, owner=i, max_tokens=24) for i, p in enumerate(PROMPTS * 2)]
    assert crowd(engine, asked) == [[by_transformers(home / "models/tiny", p)] for p in PROMPTS] * 2
    assert max(seen) <= engine.shelf.memory_bytes and max(seen) >= lane.weight_bytes + 4 * each
    engine.shelf.training_bytes = 2**60
    with pytest.raises(Unavailable) as caught:
        run(engine, request(ref, "x", max_tokens=8))
    assert caught.value.code == "training_needs_memory"


def test_numbers_that_are_none_end_their_own_request_alone(small, home):  # noqa: F811
    """A model that computes NaN after one token, and answers as ever where that token does not stand."""
    folder = home / "models" / "broken"
    model = AutoModelForCausalLM.from_pretrained(home / "models/tiny", dtype=torch.float32)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    with torch.no_grad():
        model.get_input_embeddings().weight[400] = float("nan")
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(home / "models/tiny").save_pretrained(folder)
    engine, ref = small(), ref_of(home, "models/broken")
    good = [request(ref, PROMPTS[i], owner=i, max_tokens=60, **ENDLESS) for i in range(2)]
    expected = [run(engine, r)[0] for r in good]
    bad = request(ref, "x", owner=5).model_copy(update={"prompt": None, "tokens": [10, 11, 400, 12]})
    found = {}
    threads = [in_thread(lambda i=i, r=r: found.__setitem__(i, run(engine, r)[0])) for i, r in enumerate(good)]
    soon(lambda: len(engine.active) == 2)
    last = last_of(engine, bad)
    assert (last.type, last.code) == ("error", "not_a_number") and "checkpoint" in last.hint
    for thread in threads:
        thread.join(30)
    assert [found[0], found[1]] == expected
    assert crowd(engine, [*good, *good]) == expected * 2, "what the broken one wrote into its slot is still there"


def test_an_adapter_that_holds_nan_is_refused(small, home, tmp_path, tiny_model):  # noqa: F811
    """In a batch it would reach the rows of others, since nothing times NaN is NaN."""
    from safetensors.torch import load_file, save_file

    adapter = make_adapter(tmp_path / "a", tiny_model, 1)
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    save_file(tensors, tmp_path / "a" / "adapter_model.safetensors")
    with pytest.raises(BadModel, match="NaN"):
        small().shelf.place(ref_of(home, adapters=[adapter]))


def test_a_fault_in_sampling_ends_its_own_request_alone(small, home, monkeypatch):  # noqa: F811
    engine, ref, choose = small(), ref_of(home), Sampler.choose

    def breaks(self, logits):
        return choose(self, logits[:0] if self.generator.initial_seed() == 666 else logits)

    monkeypatch.setattr(Sampler, "choose", breaks)
    talk = engine.answer(request(ref, "x", max_tokens=100, **ENDLESS))
    next(talk), next(talk)
    last = last_of(engine, request(ref, "y", owner=1, seed=666, temperature=1.0))
    assert (last.type, last.status) == ("error", 500) and last.message
    assert [e for entries in talk for e in entries][-1].completion_tokens == 100
    tiny = request(ref, "y", seed=5, temperature=1e-300)
    assert run(engine, tiny)[0] == run(engine, request(ref, "y"))[0], "next to no temperature is none"


def test_a_dead_engine_tells_who_waits_and_ends_its_process(small, home):  # noqa: F811
    """What kills the thread is a real exception in it; the worker's process ends with a code of its own, and is started again."""
    died = threading.Event()
    engine, ref = small(on_death=died.set), ref_of(home)
    talk = engine.answer(request(ref, "x", max_tokens=500, **ENDLESS))
    next(talk), next(talk)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(engine._thread.ident), ctypes.py_object(SystemExit))
    last = [e for entries in talk for e in entries][-1]
    assert (last.type, last.status) == ("error", 503) and died.wait(5)
    with pytest.raises(Unavailable):
        run(engine, request(ref, "x"))
    child = os.fork()  # which computes nothing: it only has a worker's engine, and loses its thread
    if child == 0:
        try:
            its = inference_task._started_engine.__wrapped__()
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(its._thread.ident), ctypes.py_object(SystemExit))
            its._notify()
            time.sleep(20)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == inference_task.DEAD_ENGINE
