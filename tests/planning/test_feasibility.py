"""What is wrong with an order's data is said before a job exists: in the service, the API and the form."""

from __future__ import annotations

import html
import json
import re
import time

import pytest
from sqlalchemy import select

from app import spec
from app.datasets import ingest_task, report
from app.datasets import service as datasets
from app.errors import BadField
from app.jobs import request as job_request
from app.jobs import service as jobs
from app.jobs import spec_builder
from app.jobs.request import JobRequest
from app.kit import ids
from app.kit.humanize import human_bytes
from app.machines import heartbeats
from app.planning import feasibility
from app.run_settings import RunSettings
from app.shapes import Shape, Structure
from app.storage import files
from app.strategies import STRATEGIES
from app.strategies.lora import Lora
from app.tables import Dataset
from tests.conftest import wait_until
from tests.data_worker import data_worker
from tests.factories import upload
from worker import tasks


@pytest.fixture
def read(session, user, data_dir):
    """Rows → a dataset, read by the real reader."""

    return lambda rows, name="kinds.jsonl": upload(session, user, rows, name)


def labelled(*labels: str, each: int = 6) -> list[dict]:
    return [{"text": f"text {n} about {label}", "label": label} for label in labels for n in range(each)]


def order_of(dataset, **more) -> dict:
    return {"model": "tiny", "dataset_id": ids.public(ids.DATASET, dataset.id), "strategy": {"name": "dense_head"}, **more}


def refused(session, user, body: dict) -> BadField:
    with pytest.raises(BadField) as caught:
        jobs.create(session, user, job_request.read_order(body))
    assert jobs.list_(session, user) == []
    assert caught.value.hint
    return caught.value


def told(session, user, body: dict) -> list[str]:
    return spec_builder.estimate_of(session, spec_builder.build_spec(session, user, job_request.read_order(body)))["warnings"]


def test_one_class_only(session, user, tiny_registered, read):
    error = refused(session, user, order_of(read(labelled("card"))))
    assert error.code == "one_class" and error.param == "dataset_id"
    assert "All 6 rows of kinds have the label “card”" in error.message


def test_ten_thousand_classes(session, user, tiny_registered, read):
    rows = [{"text": f"text {n}", "label": f"name {n}"} for n in range(10_000)]
    error = refused(session, user, order_of(read(rows)))
    assert error.code == "too_many_classes" and "10,000 different labels" in error.message and "5,000" in error.message


def test_labels_that_only_the_validation_rows_have(session, user, tiny_registered, read):
    train, check = read(labelled("card", "cash")), read(labelled("card", "coin", "note", each=2), "check.jsonl")
    body = order_of(train, validation_dataset_id=ids.public(ids.DATASET, check.id))
    error = refused(session, user, body)
    assert error.code == "unseen_labels" and error.param == "validation_dataset_id"
    assert "2 labels of the validation dataset check are in no training row: “coin”, “note”." in error.message
    fewer = read(labelled("card", each=2), "fewer.jsonl")  # a class nobody checks is no fault
    assert told(session, user, order_of(train, validation_dataset_id=ids.public(ids.DATASET, fewer.id))) == []


def test_unseen_labels_are_named_among_thousands(session, user, tiny_registered, read):
    known = [{"text": f"text {n}", "label": f"kind {n % 1200}"} for n in range(2400)]
    checked = read([*known[:50], {"text": "other", "label": "kind 7777"}], "checked.jsonl")
    assert report.MAX_LABELS >= spec.MAX_CLASSES
    error = refused(session, user, order_of(read(known), validation_dataset_id=ids.public(ids.DATASET, checked.id)))
    assert error.code == "unseen_labels" and "“kind 7777”" in error.message


def test_a_class_with_one_row_is_told(session, user, tiny_registered, read):
    found = told(session, user, order_of(read([*labelled("card", "cash"), {"text": "lost it", "label": "loss"}])))
    assert len(found) == 1 and found[0].startswith("1 class has one row only (“loss”)")


def test_labels_of_numbers_and_words_are_told(session, user, tiny_registered, read):
    found = told(session, user, order_of(read(labelled("1", "2", "card"))))
    assert found == ["Some labels are numbers (“1”, “2”) and the others are words. Check that they mean what they should."]
    assert told(session, user, order_of(read(labelled("1", "2", "-3", "4.5"), "numbers.jsonl"))) == []


def test_a_label_for_nearly_every_row_is_told(session, user, tiny_registered, read):
    rows = [{"text": f"text {n}", "label": f"name {n}"} for n in range(60)]
    assert ["60 labels for 60 rows" in text for text in told(session, user, order_of(read(rows)))] == [True]


def test_empty_texts_are_told(session, user, tiny_registered, read):
    found = told(session, user, order_of(read([*labelled("card", "cash"), {"text": " ", "label": "card"}, {"text": "", "label": "cash"}])))
    assert found[0].startswith("2 of 14 rows of kinds are excluded, 2 of them because a text is empty.")


def test_nothing_but_empty_texts_is_refused(session, user, tiny_registered, data_dir):
    file = files.add_bytes(session, user, b'{"text": "", "label": "a"}\n{"text": " ", "label": "b"}', "empty.jsonl", "fine-tune")
    session.flush()
    dataset = datasets.create(session, user, file)
    session.commit()
    ingest_task.read(dataset.id)
    session.refresh(dataset)
    error = refused(session, user, order_of(dataset))
    assert error.code == "invalid_training_file"


def test_texts_beyond_the_window_or_the_longest_length_are_told(session, user, tiny_registered, read):
    dataset = read([*labelled("card", "cash"), *[{"text": "wood " * 2000 + str(n), "label": "card"} for n in range(3)]])
    (found,) = told(session, user, order_of(dataset))
    assert "the model reads 512 at once" in found and "a model with a longer window" in found
    (found,) = told(session, user, order_of(dataset, run={"max_length": 64}))
    assert "this job truncates rows to 64" in found and "Raise “Max length”" in found
    dataset.report = {**dataset.report, "longest": 9000, "tokens": 30_000, "token_lengths": [[4, 12], [512, 2], [8192, 1]]}
    (found,) = told(session, user, order_of(dataset))
    assert "and 3 rows are longer" in found, "the report's own count of rows, as its page shows it"
    dataset.report = {**dataset.report, "rows_cut": []}
    (found,) = told(session, user, order_of(dataset))
    assert "about 9,000 tokens" in found and "at least 1 row is longer" in found, "512 itself still fits"


@pytest.mark.parametrize(
    ("strategy", "param"),
    [
        ({"name": "lora", "rank": 0}, "strategy.rank"),
        ({"name": "prompt_tuning", "tokens": -1}, "strategy.tokens"),
        ({"name": "lora", "width": 3}, "strategy.width"),
        ({"name": "magic"}, "strategy.name"),
    ],
)
def test_a_setting_out_of_range(session, user, tiny_registered, read, strategy, param):
    assert refused(session, user, order_of(read(labelled("card", "cash")), strategy=strategy)).param == param


def test_learnt_tokens_that_leave_no_room_for_the_row(session, user, tiny_registered, read):
    chats = read([{"prompt": f"{n}?", "completion": "Yes."} for n in range(20)], "chats.jsonl")
    error = refused(session, user, order_of(chats, strategy={"name": "prompt_tuning", "tokens": 20}, run={"max_length": 22}))
    assert error.code == "no_room" and error.param == "strategy"
    assert spec_builder.build_spec(session, user, job_request.read_order(order_of(chats, strategy={"name": "prompt_tuning", "tokens": 20})))


def test_what_nothing_would_read_is_refused(session, user, tiny_registered, read):
    kinds = read(labelled("card", "cash"))
    error = refused(session, user, order_of(kinds, strategy={"name": "lora", "target_modules": "q_prog"}))
    assert error.param == "strategy.target_modules" and "“q_prog”" in error.message and "q_proj" in error.hint
    error = refused(session, user, order_of(kinds, strategy={"name": "lora", "bias": "all"}))
    tables = refused(session, user, order_of(kinds, strategy={"name": "lora", "modules_to_save": ["embed_tokens"]}))
    assert tables.param == "strategy.modules_to_save" and tables.code == "setting_without_use"
    named = refused(session, user, order_of(kinds, strategy={"name": "lora", "modules_to_save": "q_proj"}))
    assert named.param == "strategy.modules_to_save" and "It takes embed_tokens and lm_head" in named.hint
    assert error.param == "strategy.bias" and error.code == "no_biases" and error.hint == "Leave bias out."
    partly = Shape.model_validate(
        {**tiny_registered.shape, "model_type": "qwen2", "attention_bias": True}
    )  # queries, keys and values alone
    with pytest.raises(BadField, match="layers that LoRA is on have no biases") as caught:
        feasibility.refuse_modules(Lora(bias="lora_only", layers="feed-forward"), partly, "generation")
    assert caught.value.hint == "Leave bias out, or set it to all."
    for fits in (Lora(bias="all", layers="feed-forward"), Lora(bias="lora_only"), Lora()):
        feasibility.refuse_modules(fits, partly, "generation")
    ada = heartbeats.training_machine().model_copy(update={"gpu_memory_bytes": 2**34, "gpu_capability": 8.9})
    with pytest.raises(BadField, match="Biases and tables that learn"):
        feasibility.refuse_without_gpu(Lora(bias="all"), RunSettings(frozen_weights="fp8"), "generation", ada)
    frozen = {"name": "feature_extraction", "classifier": "logistic"}
    for run in ({"neftune_noise_alpha": 5}, {"optimizer": "lion"}, {"warmup_steps": 3}):
        error = refused(session, user, order_of(kinds, strategy=frozen, run=run))
        assert error.code == "setting_without_use" and error.param == f"run.{next(iter(run))}"
    assert spec_builder.build_spec(
        session, user, job_request.read_order(order_of(kinds, strategy={**frozen, "classifier": "dense"}, run={"optimizer": "lion"}))
    )


def test_general_rows_where_no_text_is_trained(session, user, tiny_registered, read):
    run = {"rehearsal_fraction": 0.1}
    kinds, chats = read(labelled("card", "cash")), read([{"prompt": f"{n}?", "completion": "Yes."} for n in range(20)], "chats.jsonl")
    pairs = read([{"prompt": f"{n}?", "chosen": "Yes.", "rejected": "No."} for n in range(20)], "pairs.jsonl")
    lora, frozen = {"name": "lora"}, {"name": "feature_extraction"}
    for data, strategy, said in ((kinds, lora, "classification"), (kinds, frozen, "reads the base once"), (pairs, lora, "preference")):
        error = refused(session, user, order_of(data, strategy=strategy, run=run))
        assert (error.param, error.code) == ("run.rehearsal_fraction", "setting_without_use") and said in error.message
    error = refused(session, user, order_of(chats, strategy=lora, run={**run, "packing": False}))
    assert error.param == "run.rehearsal_fraction" and "packing" in error.hint
    for wrong in (-0.1, 0.6, "much"):
        assert refused(session, user, order_of(chats, strategy=lora, run={"rehearsal_fraction": wrong})).param == "run.rehearsal_fraction"
    built = spec_builder.build_spec(session, user, job_request.read_order(order_of(chats, strategy=lora, run=run)))
    assert built.run.rehearsal_fraction == 0.1


def test_new_tokens_that_cannot_be_added(session, user, tiny_registered, read):
    chats = read([{"prompt": f"{n}?", "completion": "Yes."} for n in range(20)], "chats.jsonl")
    pairs = read([{"prompt": f"{n}?", "chosen": "Yes.", "rejected": "No."} for n in range(20)], "pairs.jsonl")
    kinds, lora, frozen = read(labelled("card", "cash")), {"name": "lora"}, {"name": "feature_extraction"}
    for data, strategy, said in (
        (kinds, lora, "classification"),
        (kinds, frozen, "reads the base once"),
        (pairs, lora, "not for preference"),
    ):
        error = refused(session, user, order_of(data, strategy=strategy, run={"new_tokens": ["fingerboard"]}))
        assert (error.param, error.code) == ("run.new_tokens", "setting_without_use") and said in error.message
    wrong = {
        "is empty or only white space": [" "], "It takes 1 to 1000": [], "these are 1,001": [f"word{n}" for n in range(1001)],
        "a token may have 100": ["x" * 101], "form of a special token": ["<|tool|>"], "begins or ends with white space": [" violin"],
        "another character that cannot be seen": ["a\nb"], "is there twice": ["viola", "viola"],
    }  # fmt: skip
    for said, tokens in wrong.items():
        error = refused(session, user, order_of(chats, strategy=lora, run={"new_tokens": tokens}))
        assert error.param == "run.new_tokens" and said in error.hint, error.hint
    for tokens, said in ((["e"], "has a token for “e” already"), (["a<|im_end|>"], "form of a special token")):
        error = refused(session, user, order_of(chats, strategy=lora, run={"new_tokens": tokens}))
        assert said in error.message + (error.hint or "")
    shape = Shape.model_validate(tiny_registered.shape)
    structure = Structure(kinds=(), order=(), stack="h", embedding=1, parameters=1, refused=(("new_tokens", "it has a second table"),))
    with pytest.raises(BadField, match="new tokens failed: it has a second table") as caught:
        feasibility.refuse_new_tokens(
            Lora(), RunSettings(new_tokens=("a b",)), "generation", shape.model_copy(update={"structure": structure})
        )
    assert caught.value.param == "run.new_tokens"
    tables = {"name": "lora", "modules_to_save": "embed_tokens"}
    error = refused(session, user, order_of(chats, strategy=tables, run={"new_tokens": ["fingerboard"]}))
    assert error.param == "strategy.modules_to_save"
    asked = order_of(chats, strategy=lora, run={"new_tokens": "fingerboard\n <tool>\n"})
    assert spec_builder.build_spec(session, user, job_request.read_order(asked)).run.new_tokens == ("fingerboard", "<tool>")


def test_a_chat_template_where_no_conversation_is_written(session, user, tiny_registered, read):
    run = {"chat_template": "llama3"}
    kinds, text = read(labelled("card", "cash")), read([{"text": f"Number {n} is told of."} for n in range(20)], "text.jsonl")
    for data, strategy in ((kinds, "dense_head"), (text, "lora")):
        error = refused(session, user, order_of(data, strategy={"name": strategy}, run=run))
        assert (error.param, error.code) == ("run.chat_template", "setting_without_use")
    chats = read([{"prompt": f"{n}?", "completion": "Yes."} for n in range(20)], "chats.jsonl")
    error = refused(session, user, order_of(chats, strategy={"name": "lora"}, run={"chat_template": "jinja", "chat_template_jinja": "{{"}))
    assert error.param == "run.chat_template_jinja" and "Line 1" in error.hint
    assert (
        spec_builder.build_spec(
            session, user, job_request.read_order(order_of(chats, strategy={"name": "lora"}, run=run))
        ).run.chat_template
        == "llama3"
    )
    tiny_registered.kind = "generic"  # it is given prompt and completion as they stand
    session.commit()
    if chats.format == "completion":
        error = refused(session, user, order_of(chats, strategy={"name": "lora"}, run=run))
        assert error.code == "setting_without_use" and "rows with messages" in error.hint


def test_accumulation_means_the_usual_thing_or_nothing(client, session, user, tiny_registered, read):
    chats = read([{"prompt": f"{n}?", "completion": "Yes."} for n in range(40)], "chats.jsonl")
    error = refused(session, user, order_of(chats, strategy={"name": "lora"}, run={"accumulation": 4}))
    assert error.param == "run.accumulation" and "micro_batches" in error.hint and "gradient_accumulation_steps" in error.hint
    run = {"batch_size": 4, "gradient_accumulation_steps": 2, "epochs": 2, "validation_fraction": 0}
    built = spec_builder.build_spec(session, user, job_request.read_order(order_of(chats, strategy={"name": "lora"}, run=run)))
    assert built.run.max_tokens_per_step is None and spec_builder.estimate_of(session, built)["steps"] == 10
    assert (
        refused(session, user, order_of(chats, strategy={"name": "lora"}, run={**run, "max_tokens_per_step": 256})).param
        == "run.batch_size"
    )
    typed = {
        "model": "tiny",
        "dataset": ids.public(ids.DATASET, chats.id),
        "strategy": "lora",
        "run.batch_size": "4",
        "run.eval_steps": "5",
    }
    page = html.unescape(client.get("/jobs/new", params=typed).text)
    for name in ("max_tokens_per_step", "evaluations_per_epoch"):  # sent back as it stands, it is no second wish
        field = re.search(rf'<input[^>]*name="run\.{name}"[^>]*>', page)
        assert field and re.search(r'value="[^"]+"', field.group(0)) is None, name
    assert "It means the same" not in page
    text = read([{"text": f"Number {n} is told of."} for n in range(20)], "text.jsonl")
    error = refused(session, user, order_of(text, strategy={"name": "lora"}, run={"train_on": "all_turns"}))
    assert error.param == "run.train_on"


def test_what_needs_a_gpu_is_refused_without_one(api, client, session, user, tiny_registered, read, monkeypatch):
    """By the API, the form, the advice and a comparison, with what to take instead."""
    kinds = read(labelled("card", "cash"))
    light = {"optimizer": "adamw_8bit"}
    error = refused(session, user, order_of(kinds, run=light))
    assert error.code == "needs_gpu" and error.param == "run.optimizer" and "adamw" in error.hint
    assert refused(session, user, order_of(kinds, run={"optimizer": "paged_adamw_8bit"})).code == "needs_gpu"
    named = {"model": "tiny", "dataset_id": ids.public(ids.DATASET, kinds.id)}
    for path, order in (
        ("/v1/fine_tuning/jobs", order_of(kinds, run=light)),
        ("/v1/estimates", order_of(kinds, run=light)),
        ("/v1/comparisons", {**named, "strategies": ["lora", "full"], "run": light}),
        ("/v1/advice", {**named, "run": light}),
    ):
        answer = api.post(path, json=order)
        assert answer.status_code == 400 and answer.json()["error"]["code"] == "needs_gpu", path
    typed = {"model": "tiny", "dataset": named["dataset_id"], "strategy": "dense_head", "run.optimizer": "adamw_8bit"}
    page = html.unescape(client.get("/jobs/new", params=typed).text)
    assert error.message in page and "disabled>Start" in page
    squeezed = refused(session, user, order_of(kinds, strategy={"name": "qlora"}))
    assert squeezed.code == "strategy_unavailable" and "Choose LoRA, which needs no GPU" in squeezed.message

    card = heartbeats.training_machine().model_copy(update={"gpu_name": "a card", "gpu_memory_bytes": 80 * 2**30})
    monkeypatch.setattr(heartbeats, "training_machines", lambda *_: [card])
    assert spec_builder.build_spec(session, user, job_request.read_order(order_of(kinds, run=light, strategy={"name": "qlora"})))


@pytest.mark.long
def test_the_device_of_a_run(api, client, session, user, tiny_registered, read, monkeypatch):
    """cuda is refused where nothing has a GPU, and cpu is planned without the one that is there."""
    kinds = read(labelled("card", "cash"))
    named = {"model": "tiny", "dataset_id": ids.public(ids.DATASET, kinds.id)}
    on_gpu, on_cpu = {"device": "cuda"}, {"device": "cpu"}
    for path, order in (
        ("/v1/fine_tuning/jobs", order_of(kinds, run=on_gpu)),
        ("/v1/estimates", order_of(kinds, run=on_gpu)),
        ("/v1/comparisons", {**named, "strategies": ["lora"], "run": on_gpu}),
        ("/v1/advice", {**named, "run": on_gpu}),
    ):
        error = api.post(path, json=order).json()["error"]
        assert (error["code"], error["param"]) == ("needs_gpu", "run.device"), path
    typed = {"model": "tiny", "dataset": named["dataset_id"], "strategy": "lora"}
    page = html.unescape(client.get("/jobs/new", params=typed | {"run.device": "cuda"}).text)
    assert "The device cuda needs an NVIDIA GPU, and the machine that trains shows none." in page and "disabled>Start" in page

    here = heartbeats.training_machine()
    card = here.model_copy(update={"gpu_name": "a card", "gpu_memory_bytes": 80 * 2**30, "bf16_pays": True})
    monkeypatch.setattr(heartbeats, "training_machines", lambda *_: [card])
    lora = order_of(kinds, strategy={"name": "lora"})
    found = {name: api.post("/v1/estimates", json={**lora, "run": {"device": name}}).json() for name in ("auto", "cuda", "cpu")}
    assert {name: one["device"] for name, one in found.items()} == {"auto": "cuda", "cuda": "cuda", "cpu": "cpu"}
    assert found["auto"] == found["cuda"] and found["cpu"]["tokens_per_second"] < found["cuda"]["tokens_per_second"]
    for method, run, param in (("qlora", on_cpu, "strategy"), ("lora", {**on_cpu, "optimizer": "adamw_8bit"}, "run.optimizer")):
        error = refused(session, user, order_of(kinds, strategy={"name": method}, run=run))
        assert error.param == param and "shows none" not in error.message
    assert error.message.endswith("the run's device is cpu.")
    with pytest.raises(BadField, match="and the run's device is cpu"):
        feasibility.refuse_without_gpu(Lora(), RunSettings(frozen_weights="fp8", device="cpu"), "generation", card)
    assert api.post("/v1/advice", json={**named, "run": on_cpu}).json()["facts"] == {
        **api.post("/v1/advice", json=named).json()["facts"], "cuda": False, "memory_bytes": here.training_memory_bytes,
    }  # fmt: skip
    for asked, memory, says, four_bits in (
        ("auto", "85.9 GB", "GPU", False),
        ("cpu", human_bytes(here.training_memory_bytes), "CPU", True),
    ):
        page = client.get("/jobs/new", params=typed | {"run.device": asked}).text
        assert f'<td>Device</td><td class="n">{says}</td>' in page and f"</b> of {memory}<" in page
        assert ("A 4-bit base needs an NVIDIA GPU." in page) is four_bits
    job = api.post("/v1/fine_tuning/jobs", json={**lora, "run": on_cpu}).json()
    assert (
        jobs.get(session, user, ids.parse(ids.JOB, job["id"])).spec["run"]["device"] == "cpu" and "device" not in RunSettings().model_dump()
    )


def test_a_dataset_still_being_read_is_checked_when_it_is_ready(session, user, tiny_registered, data_dir):
    file = files.add_bytes(session, user, "\n".join(map(json.dumps, labelled("card"))).encode(), "one.jsonl", "fine-tune")
    session.flush()
    dataset = datasets.create(session, user, file)
    session.commit()
    job = jobs.create(
        session, user, JobRequest(model="tiny", dataset_id=dataset.id, strategy={"name": "dense_head"}, task="classification")
    )
    session.commit()
    tasks.read(str(dataset.id))
    session.refresh(job)
    assert job.status == "failed" and job.error["code"] == "one_class"


def test_rows_that_the_template_refuses_are_told_before_the_launch(session, user, tiny_registered, read):
    called = [{"type": "function", "function": {"name": "weigh", "arguments": "{}"}}]
    row = {"messages": [{"role": "user", "content": "How heavy?"}, {"role": "assistant", "content": None, "tool_calls": called}]}
    body = order_of(read([*chats(("Why?", "So.")), row], "called.jsonl"), strategy={"name": "lora"})
    assert any("The chat template of tiny refuses 1 of 2 rows" in text and "hermes" in text for text in told(session, user, body))
    body["run"] = {"chat_template": "hermes"}
    assert not any("refuses" in text for text in told(session, user, body))


@pytest.mark.long
def test_the_api_and_the_form_say_the_same(api, client, session, user, tiny_registered, read):
    bad = read(labelled("card"))
    answer = api.post("/v1/fine_tuning/jobs", json=order_of(bad))
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "one_class"
    page = client.get("/jobs/new", params={"model": "tiny", "dataset": ids.public(ids.DATASET, bad.id), "strategy": "dense_head"})
    assert answer.json()["error"]["message"] in html.unescape(page.text) and "disabled>Start" in page.text
    odd = read(labelled("1", "card"), "odd.jsonl")
    found = api.post("/v1/estimates", json=order_of(odd)).json()["warnings"]
    assert len(found) == 1
    page = client.get("/jobs/new", params={"model": "tiny", "dataset": ids.public(ids.DATASET, odd.id), "strategy": "dense_head"})
    assert found[0] in html.unescape(page.text) and "disabled>Start" not in page.text


def chats(*turns: tuple[str, str]) -> list[dict]:
    return [{"messages": [{"role": "user", "content": ask}, {"role": "assistant", "content": tell}]} for ask, tell in turns]


def test_rows_on_both_sides_are_told_before_and_after_the_launch(api, client, session, user, tiny_registered, read):
    """By the estimate, the form and the job, also one ordered before the rows were compared; and they go with one click."""
    rows = chats(*((f"Question {n}", f"Answer {n}") for n in range(30)))
    learnt, held = read(rows, "learnt.jsonl"), read(rows[:3] + chats(("question  4", "Other"), ("New", "New")), "held.jsonl")
    keys = [ids.public(ids.DATASET, found.id) for found in (learnt, held)]
    order = {"model": "tiny", "dataset_id": keys[0], "validation_dataset_id": keys[1], "strategy": {"name": "lora"}}
    job = jobs.create(session, user, job_request.read_order(order))
    session.commit()
    assert job.estimate["overlap"]["status"] == "waiting" and not job.estimate["warnings"]
    old = jobs.create(session, user, job_request.read_order(order))
    old.spec = old.spec | {"strategy": {"name": "of an earlier version"}}  # is passed over
    session.commit()
    with data_worker():
        said = api.post("/v1/estimates", json=order).json()
        while said["overlap"]["status"] == "waiting":
            said = api.post("/v1/estimates", json=order).json()
        assert said["overlap"]["rows"] == 4 and said["overlap"]["held_out"] == 5
        (warning,) = said["warnings"]
        assert (
            warning.startswith("4 of the 5 validation rows")
            and "3 as whole rows, 1 by their prompt" in warning
            and "lines 1, 2, 3, 4" in warning
        )
        wait_until(lambda: session.refresh(job) or job.estimate["warnings"], what="the job's warning", seconds=30)
        assert job.estimate["warnings"] == [warning] and job.estimate["overlap"] == said["overlap"]
        page = html.unescape(client.get("/jobs/new", params={"model": "tiny", "dataset": keys[0], "validation": keys[1]}).text)
        assert warning in page and said["overlap"]["page"] in page
        both = client.get(said["overlap"]["page"]).text
        assert f"/datasets/{keys[1]}/rows?line=4" in both and "Remove 4 rows from the training set" in both
        done = client.post(f"/datasets/{keys[0]}/split/drop", data={"validation": keys[1]}, follow_redirects=False)
        assert done.status_code == 303, done.text
        new = session.scalars(select(Dataset).where(Dataset.version == 2)).one()
        assert new.edits == [{"operation": "drop_row", "lines": [1, 2, 3, 5]}]


def test_the_form_asks_for_rows_on_both_sides_of_its_own_split(client, session, user, tiny_registered, read):
    found = read(chats(*((f"Question {n % 10}", f"Answer {n}") for n in range(40))), "same.jsonl")
    params = {"model": "tiny", "dataset": ids.public(ids.DATASET, found.id), "run.validation_fraction": "0.25"}
    assert "Checking for train/validation leakage" in client.get("/jobs/new", params=params).text
    with data_worker():
        for _ in range(100):
            page = html.unescape(client.get("/jobs/new", params=params).text)
            if "Checking for" not in page:
                break
            time.sleep(0.1)
    assert "10 of the 10 validation rows are also in the training set of same, by their prompt" in page


def test_a_request_cannot_put_its_job_into_a_comparison(api, session, user, tiny_registered, read):
    import uuid

    chats = read([{"prompt": f"{n}?", "completion": "Yes."} for n in range(20)], "chats.jsonl")
    answer = api.post("/v1/fine_tuning/jobs", json=order_of(chats, strategy={"name": "lora"}, comparison_id=str(uuid.uuid4())))
    assert answer.status_code == 200 and jobs.list_(session, user)[0].comparison_id is None


def test_a_classifiers_head_is_counted_among_what_learns(session, user, tiny_registered, read):
    from app.strategies import STRATEGIES

    spec = spec_builder.build_spec(session, user, job_request.read_order(order_of(read(labelled("card", "cash", "coin")))))
    three, two = (STRATEGIES["dense_head"]().trainable_parameters(spec.model.shape, task="classification", labels=n) for n in (3, 2))
    assert spec_builder.estimate_of(session, spec)["trainable_parameters"] == three > two


@pytest.fixture
def encoder(session, tiny_registered):
    """The shape of a small BERT under the name `encoder`; nothing here loads its weights."""
    from app.tables import Model
    from tests.strategies.test_every_strategy import ENCODER

    made = Model(
        name="encoder", title="Encoder", kind="encoder", path=tiny_registered.path, revision="1" * 64, source={"kind": "folder"},
        license="apache-2.0", shape=ENCODER.model_dump(), bytes=1,
    )  # fmt: skip
    session.add(made)
    session.commit()
    return made


def tuned(session, user, base, strategy: str, labels: list[str] | None = None):
    from app.tables import Model

    made = Model(
        owner_id=user.id, name=f"{strategy}-{base.name}", title="Tuned", kind="classifier" if labels else "dialogue", path="runs/x/a1/final",
        revision="2" * 64, adapter_sha256="3" * 64, source={"from": "job"}, license="apache-2.0", shape=base.shape, bytes=1,
        base_id=base.id, strategy=strategy, adapter=True, labels=labels,
    )  # fmt: skip
    session.add(made)
    session.commit()
    return made


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_the_trainer_would_refuse_to_tune_further_is_refused_before(api, client, session, user, tiny_registered, read, strategy):
    if not STRATEGIES[strategy].adapter:
        pytest.skip("its result is a whole model")
    chats = read([{"prompt": f"{n}?", "completion": "Yes."} for n in range(20)], "chats.jsonl")
    model = tuned(session, user, tiny_registered, strategy)
    body = order_of(chats, model=model.name, strategy={"name": "lora"})
    if STRATEGIES[strategy].merges:
        assert spec_builder.build_spec(session, user, job_request.read_order(body)).model.adapters
        return
    error = refused(session, user, body)
    assert error.code == "cannot_be_tuned" and error.param == "model" and "cannot be merged" in error.message
    assert api.post("/v1/fine_tuning/jobs", json=body).json()["error"]["code"] == "cannot_be_tuned"
    ranking = api.post("/v1/advice", json={"model": model.name, "dataset_id": body["dataset_id"]}).json()["ranking"]
    assert not any(a["available"] for a in ranking) and all(a["reason"] == error.message for a in ranking)
    page = client.get("/jobs/new", params={"model": model.name, "dataset": body["dataset_id"], "strategy": "lora"})
    assert error.message in html.unescape(page.text) and "disabled>Start" in page.text
    listed = api.get("/v1/strategies", params={"model": model.name}).json()["data"]
    assert not any(one["available"] for one in listed)


def test_a_classifier_adapter_is_not_tuned_further(session, user, tiny_registered, read):
    model = tuned(session, user, tiny_registered, "lora", labels=["card", "cash"])
    error = refused(session, user, order_of(read(labelled("card", "cash")), model=model.name))
    assert error.code == "cannot_be_tuned" and "on top of another model" in error.message
    chats = read([{"prompt": f"{n}?", "completion": "Yes."} for n in range(20)], "chats.jsonl")
    assert "writes no text" in refused(session, user, order_of(chats, model=model.name, strategy={"name": "lora"})).message


def test_an_encoder_is_refused_and_not_advised_for_text(api, session, user, encoder, read):
    chats = read([{"prompt": f"{n}?", "completion": "Yes."} for n in range(20)], "chats.jsonl")
    body = order_of(chats, model="encoder", strategy={"name": "lora"})
    error = refused(session, user, body)
    assert error.code == "strategy_unavailable" and "writes no text" in error.message
    ranking = api.post("/v1/advice", json={"model": "encoder", "dataset_id": body["dataset_id"]}).json()["ranking"]
    assert not any(a["available"] for a in ranking)
    kinds = order_of(read(labelled("card", "cash")), model="encoder", strategy={"name": "lora"})
    assert spec_builder.build_spec(session, user, job_request.read_order(kinds)).task == "classification"


def test_rows_still_being_read_may_turn_out_to_be_labelled(session, user, encoder, data_dir):
    file = files.add_bytes(session, user, b'{"text": "a", "label": "b"}', "later.jsonl", "fine-tune")
    session.flush()
    dataset = datasets.create(session, user, file)
    session.commit()
    body = {"model": "encoder", "dataset_id": ids.public(ids.DATASET, dataset.id), "strategy": {"name": "lora"}}
    assert spec_builder.build_spec(session, user, job_request.read_order(body))
