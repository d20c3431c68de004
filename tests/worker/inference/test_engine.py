"""The engine against transformers and peft: the same answers, alone and in a crowd."""

from __future__ import annotations

import gc
import json
import shutil
import threading
import time
import uuid

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from app.errors import BadRequest, DoesNotFit
from app.inference.protocol import Done, GenerateRequest, Sampling
from app.kit import manifest
from app.settings import get_settings
from app.shapes import shape_of
from app.spec import Adapter, ModelRef
from app.strategies import STRATEGIES
from worker.inference.engine import Engine
from worker.inference.model_pool import ModelPool
from worker.modeling.kv_cache import ForwardPass, Segment, current_step
from worker.modeling.loading import BadModel, load_model

PROMPTS = [
    "The bridge", "A cello needs a wider bass bar than a viola, because", "x", "Why does my violin buzz? " * 8,
    "One, two, three,", "She measures the thickness of the plate every centimetre: 3.2 mm in the middle, " * 4,
]  # fmt: skip


@pytest.fixture
def home(data_dir, tiny_model):
    shutil.copytree(tiny_model, data_dir / "models" / "tiny")
    return data_dir


def ref_of(home, path="models/tiny", adapters=(), kind="generic", revision="r0"):
    shape = shape_of(json.loads((home / path / "config.json").read_text()))
    return ModelRef(id=uuid.uuid4(), name="tiny", kind=kind, path=path, revision=revision, adapters=tuple(adapters), shape=shape)


@pytest.fixture
def engine(home):
    running = Engine(ModelPool(device="cpu"), chunk=7, lone_chunk=11)  # small chunks, so that every prompt is read in several
    yield running
    running.close()
    gc.collect()


def request(ref, prompt, seed=0, owner=0, **sampling):
    asked = {"prompt": prompt} if isinstance(prompt, str) else {"messages": prompt}
    settings = Sampling(**{"temperature": 0, "max_tokens": 24, **sampling})
    return GenerateRequest(id=uuid.uuid4(), owner=uuid.UUID(int=owner), model=ref, sampling=settings, seed=seed, **asked)


def run(engine, asked):
    texts, reasons, done = {}, {}, None
    for entries in engine.answer(asked):
        for entry in entries:
            if entry.type == "text":
                texts[entry.index] = texts.get(entry.index, "") + entry.text
            elif entry.type == "finished":
                reasons[entry.index] = entry.reason
            elif entry.type == "done":
                done = entry
            elif entry.type == "error":
                raise AssertionError(entry.message)
    return [whole_characters(texts.get(i, "")) for i in range(asked.sampling.n)], reasons, done


def crowd(engine, requests):
    found = {}
    threads = [threading.Thread(target=lambda i=i, r=r: found.__setitem__(i, run(engine, r)[0])) for i, r in enumerate(requests)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return [found[i] for i in range(len(requests))]


def by_transformers(folder, prompt, tokens=24, adapter=None):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter:
        model = PeftModel.from_pretrained(model, adapter)
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    out = model.generate(**ids, max_new_tokens=tokens, do_sample=False)
    return whole_characters(tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))


def whole_characters(text):
    """An answer may be cut inside a character: the engine drops the half, transformers shows a mark."""
    return text.rstrip("�")


def make_adapter(folder, tiny, seed, rank=4, **more):
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    settings = {"r": rank, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | more
    model = get_peft_model(base, LoraConfig(**settings))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return Adapter(strategy="lora", path=str(folder), sha256=manifest.sha256_of(folder / "adapter_model.safetensors"))


def test_greedy_equals_transformers(engine, home):
    ref = ref_of(home)
    for prompt in PROMPTS:
        assert run(engine, request(ref, prompt))[0] == [by_transformers(home / "models/tiny", prompt)]


def test_in_a_crowd_as_alone(engine, home):
    """Greedy and sampled answers do not change with what else is being answered."""
    ref = ref_of(home)
    requests = [request(ref, p, seed=i, owner=i % 3, temperature=0 if i % 2 else 1.1, top_p=0.9) for i, p in enumerate(PROMPTS * 3)]
    alone = [run(engine, r)[0] for r in requests]
    steps = engine.steps
    assert crowd(engine, requests) == alone
    assert engine.steps - steps < steps / 2, "they were answered one after the other, not together"


def test_bf16_on_request_answers_nearly_as_float32(home, tmp_path, tiny_model, monkeypatch):
    """The likeliest tokens and their probabilities stay within what two bytes a number can hold, under an adapter too."""
    refs = [ref_of(home), ref_of(home, adapters=[make_adapter(tmp_path / "one", tiny_model, 1)])]
    said = {}
    for precision in ("fp32", "bf16"):
        monkeypatch.setenv("LUTHIER_GENERATE_PRECISION", precision)
        get_settings.cache_clear()
        engine = Engine(ModelPool(device="cpu"))
        assert engine.shelf.dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)
        asked = [request(ref, p, max_tokens=1, logprobs=True, top_logprobs=3) for p in PROMPTS for ref in refs]
        answers = [[e for entries in engine.answer(r) for e in entries if e.type == "text"] for r in asked]
        said[precision] = [x[0].logprobs[0].top[0].logprob for x in answers if x]
        engine.close()
    assert len(said["fp32"]) >= 8 and said["fp32"] != said["bf16"]
    assert said["bf16"] == pytest.approx(said["fp32"], abs=0.1)


def test_adapters_of_one_base_share_a_batch(engine, home, tmp_path, tiny_model):
    """Base, two adapters of different rank and targets, and one on top of another: each as peft says, from one load."""
    one = make_adapter(tmp_path / "one", tiny_model, 1, rank=4)
    two = make_adapter(tmp_path / "two", tiny_model, 2, rank=9, target_modules=["q_proj", "down_proj"], use_rslora=True)
    refs = [ref_of(home), ref_of(home, adapters=[one]), ref_of(home, adapters=[two]), ref_of(home, adapters=[one, two])]
    requests = [request(ref, prompt) for prompt in PROMPTS[:3] for ref in refs]
    said = crowd(engine, requests)
    for i, prompt in enumerate(PROMPTS[:3]):
        assert said[4 * i] == [by_transformers(tiny_model, prompt)]
        assert said[4 * i + 1] == [by_transformers(tiny_model, prompt, adapter=tmp_path / "one")]
        assert said[4 * i + 2] == [by_transformers(tiny_model, prompt, adapter=tmp_path / "two")]
    assert len({said[j][0] for j in range(4)}) == 4, "the adapters change nothing, so the test shows nothing"
    assert engine.shelf.loads == 1 and len(engine.shelf.lanes) == 1


def test_logits_equal_peft(home, tmp_path, tiny_model):
    adapter = make_adapter(tmp_path / "a", tiny_model, 3)
    shelf = ModelPool(device="cpu")
    place = shelf.place(ref_of(home, adapters=[adapter]))
    lane = place.lane
    for key, weights in place.adapters.items():
        lane.stack.add(key, weights, set())
    ids = list(range(10, 40))
    keys = tuple(place.adapters)
    lane.cache.grow(256, 2)
    one, two = lane.cache.slots()
    step = ForwardPass([], [Segment(one, 0, 30, 0), Segment(two, 30, 30, 0)], lane.device, lane.stack.select([(30, keys), (30, ())]))
    ours = lane.forward(step, ids * 2, [*range(30)] * 2, [29, 59])
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    with torch.no_grad():
        base = plain(torch.tensor([ids])).logits[0, -1]
        tuned = PeftModel.from_pretrained(plain, tmp_path / "a")(torch.tensor([ids])).logits[0, -1]
    assert (ours[0] - tuned).abs().max() < 1e-4 and (ours[1] - base).abs().max() < 1e-4 and (tuned - base).abs().max() > 0.01
    assert current_step() is None


def test_what_is_more_than_plain_lora_gets_its_own_tree_on_the_same_weights(engine, home, tmp_path, tiny_model):
    dora = make_adapter(tmp_path / "dora", tiny_model, 4, use_dora=True)
    folder = tmp_path / "dora"
    (folder / "strategy.json").write_text(json.dumps({"name": "lora", "rank": 4}))
    base, tuned = ref_of(home), ref_of(home, adapters=[dora])
    said = crowd(engine, [request(base, PROMPTS[0]), request(tuned, PROMPTS[0])])
    assert said == [[by_transformers(tiny_model, PROMPTS[0])], [by_transformers(tiny_model, PROMPTS[0], adapter=folder)]]
    lanes = list(engine.shelf.lanes.values())
    assert len(lanes) == 2
    small, large = sorted(lane.weight_bytes for lane in lanes)
    assert small < large / 3, "the second tree holds the base's weights a second time"
    assert run(engine, request(base, PROMPTS[0]))[0] == said[0]


@pytest.mark.parametrize("name", sorted(n for n, s in STRATEGIES.items() if "generation" in s.tasks and s.adapter))
def test_every_strategy_answers_as_in_training(engine, home, tmp_path, tiny_model, name):
    """What the trainer's own loader writes greedily, the engine writes too, beside the base and without harming it."""
    strategy = STRATEGIES[name]()
    if (reason := strategy.unavailable(ref_of(home).shape)) or name == "qlora":
        pytest.skip(reason or "needs a GPU")
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    torch.manual_seed(3)
    model = strategy.attach(plain)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    folder = tmp_path / name
    folder.mkdir()
    strategy.save(model, folder)
    (folder / "strategy.json").write_text(strategy.model_dump_json())
    base = ref_of(home)
    tuned = ref_of(home, adapters=[Adapter(strategy=name, path=str(folder), sha256="a" * 64)])
    before = run(engine, request(base, PROMPTS[0]))[0]
    said, there = crowd(engine, [request(tuned, PROMPTS[3]), request(base, PROMPTS[0])])
    assert said == [whole_characters(by_stepping(load_model(tuned), tiny_model, PROMPTS[3], strategy.virtual_tokens()))]
    assert there == before == run(engine, request(base, PROMPTS[0]))[0]


def by_stepping(model, folder, prompt, lead, tokens=24):
    """Greedy, the whole sequence anew for each token: slow, and without any cache to be wrong."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [0] * lead + tokenizer(prompt, add_special_tokens=False)["input_ids"]
    written = []
    for _ in range(tokens):
        with torch.no_grad():
            out = model(input_ids=torch.tensor([ids + written]), position_ids=torch.arange(len(ids + written))[None], use_cache=False)
        written.append(int(out.logits[0, -1].argmax()))
        if written[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(written, skip_special_tokens=True)


def test_seeds_and_several_answers(engine, home):
    ref = ref_of(home)
    three = run(engine, request(ref, PROMPTS[3], seed=7, n=3, temperature=1.0))[0]
    assert len(set(three)) == 3
    assert [run(engine, request(ref, PROMPTS[3], seed=7 + i, temperature=1.0))[0][0] for i in range(3)] == three


def test_a_conversation_goes_on_from_the_cache(engine, home):
    ref = ref_of(home, kind="dialogue")
    first = [{"role": "user", "content": "What wood is the belly made of?"}]
    said = run(engine, request(ref, first))[0][0]
    then = [*first, {"role": "assistant", "content": said}, {"role": "user", "content": "And the back?"}]
    warm, _, done = run(engine, request(ref, then))
    assert done.cached_tokens >= 16
    fresh = Engine(ModelPool(device="cpu"))
    assert run(fresh, request(ref, then))[0] == warm
    fresh.close()


def test_long_prompt_stalls_nobody(engine, home):
    """While a long prompt is read in chunks, an answer under way gets a token at every step."""
    ref = ref_of(home)
    talk = engine.answer(request(ref, "The bridge", max_tokens=200, logit_bias={70: 100}))
    next(talk), next(talk)
    before = engine.steps
    long = run(engine, request(ref, "wood and " * 60, max_tokens=1, owner=1))[2]
    assert long.prompt_tokens > 100 and engine.steps - before >= long.prompt_tokens // 7
    assert sum(len(e.text) for entries in talk for e in entries if e.type == "text") > 20


def test_limits_and_bad_requests(engine, home):
    ref = ref_of(home)
    with pytest.raises(BadRequest) as caught:
        run(engine, request(ref, "wood " * 1000))
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(BadRequest, match="empty"):
        run(engine, request(ref, ""))
    with pytest.raises(DoesNotFit, match="does not write"):
        run(engine, request(ref.model_copy(update={"kind": "encoder"}), "x"))
    with pytest.raises(BadModel, match="gone"):
        run(engine, request(ref.model_copy(update={"path": "models/none"}), "x"))
    _, reasons, done = run(engine, request(ref, "The bridge", max_tokens=None, logit_bias={70: 100}))
    assert reasons == {0: "length"} and done.completion_tokens == 512 - done.prompt_tokens
    assert all(lane.users == 0 for lane in engine.shelf.lanes.values())


def test_closing_an_answer_stops_it(engine, home):
    talk = engine.answer(request(ref_of(home), "x", max_tokens=500, logit_bias={70: 100}))
    next(talk), next(talk)
    talk.close()
    deadline = time.monotonic() + 5
    while engine.active and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not engine.active
    steps = engine.steps
    time.sleep(0.1)
    assert engine.steps == steps


def test_a_deadline_cuts_an_answer(engine, home):
    asked = request(ref_of(home), "x", max_tokens=500, logit_bias={70: 100}).model_copy(update={"seconds": 0.05})
    assert run(engine, asked)[2].completion_tokens < 499


def test_idle_models_make_room_and_busy_ones_do_not(home):
    shutil.copytree(home / "models/tiny", home / "models/other")
    need = ref_of(home).shape.parameters() * 4
    engine = Engine(ModelPool(memory_bytes=int(need * 1.9), device="cpu"))
    run(engine, request(ref_of(home), "x", max_tokens=2))
    run(engine, request(ref_of(home, "models/other"), "x", max_tokens=2))
    assert [key[0] for key in engine.shelf.lanes] == ["models/other"]
    small = ModelPool(memory_bytes=1000, device="cpu")
    with pytest.raises(DoesNotFit, match="GiB"):
        small.place(ref_of(home))
    engine.close()


def test_changed_files_are_refused(home):
    facts = manifest.write(home / "models/tiny")
    shelf = ModelPool(device="cpu")
    shelf.place(ref_of(home, revision=facts["revision"]))
    with pytest.raises(BadModel, match="revision"):
        shelf.place(ref_of(home, revision="f" * 64))
    weights = home / "models/tiny/model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(BadModel, match=r"model\.safetensors"):
        ModelPool(device="cpu").place(ref_of(home, revision=facts["revision"]))


def test_one_broken_step_ends_only_its_lane(engine, home, monkeypatch):
    ref = ref_of(home)
    run(engine, request(ref, "x"))
    lane = next(iter(engine.shelf.lanes.values()))
    real = type(lane).forward
    monkeypatch.setattr(type(lane), "forward", lambda *a: (_ for _ in ()).throw(RuntimeError("broken kernel")))
    last = [e for entries in engine.answer(request(ref, "y")) for e in entries][-1]
    assert last.type == "error" and last.status == 500 and "broken kernel" not in last.message
    monkeypatch.setattr(type(lane), "forward", real)
    assert isinstance([e for entries in engine.answer(request(ref, "x")) for e in entries][-1], Done)
