"""The chat template that a job chooses: what is trained, what the result carries, and what the playground then writes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from pydantic import ValidationError
from transformers import AutoTokenizer

from app import chat_templates, events
from app.run_settings import RunSettings
from app.spec import Adapter
from tests.tiny import CHAT_TEMPLATE
from tests.worker.inference.test_engine import request
from tests.worker.orders import chat_rows, order, put_dataset, put_model
from tests.worker.training.test_settings import TEN, of, run
from worker.data.chat_template import prepare_tokenizer
from worker.data.template_child import TemplateWriter
from worker.inference.engine import Engine
from worker.inference.model_pool import ModelPool
from worker.modeling.loading import load_tokenizer
from worker.training.objectives import objective_of

ASKED = [{"role": "system", "content": "Be brief. "}, {"role": "user", "content": " What wood?"}]
TOLD = [*ASKED, {"role": "assistant", "content": "Spruce."}, {"role": "user", "content": "Thanks"}]
WRITTEN = {
    "chatml": "<|im_start|>system\nBe brief. <|im_end|>\n<|im_start|>user\n What wood?<|im_end|>\n<|im_start|>assistant\nSpruce.<|im_end|>\n"
    "<|im_start|>user\nThanks<|im_end|>\n<|im_start|>assistant\n",
    "hermes": "<|im_start|>system\nBe brief. <|im_end|>\n<|im_start|>user\n What wood?<|im_end|>\n<|im_start|>assistant\nSpruce.<|im_end|>\n"
    "<|im_start|>user\nThanks<|im_end|>\n<|im_start|>assistant\n",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nWhat wood?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nSpruce.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nThanks<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "gemma": "<s><start_of_turn>user\nBe brief.\n\nWhat wood?<end_of_turn>\n<start_of_turn>model\nSpruce.<end_of_turn>\n"
    "<start_of_turn>user\nThanks<end_of_turn>\n<start_of_turn>model\n",
    "alpaca": "Be brief.\n\n### Instruction:\nWhat wood?\n\n### Response:\nSpruce.</s>\n\n### Instruction:\nThanks\n\n### Response:\n",
    "plain": "### System:\nBe brief.\n\n### User:\nWhat wood?\n\n### Assistant:\nSpruce.</s>\n\n### User:\nThanks\n\n### Assistant:\n",
}
FOREIGN = ("llama3", "gemma", "alpaca", "plain")
"""Templates whose tokens the small model has none of."""


@pytest.mark.parametrize("name", WRITTEN)
def test_a_named_template_writes_what_its_models_read(name: str) -> None:
    own = {"<|im_end|>", "<|eot_id|>", "<end_of_turn>"}
    text = chat_templates.source(name, None, own, begins=name in ("llama3", "gemma"))
    assert text and chat_templates.fault(text) is None
    writer = TemplateWriter(text, {"bos_token": "<s>", "eos_token": "</s>"}, ["</s>", *own])
    written = writer.chat(TOLD, None, True, 10_000)
    assert written["text"] == WRITTEN[name]
    [[place, start, end]] = written["spans"]
    assert place == 2 and written["text"][start:end].startswith("Spruce.") and written["text"][start:end] != "Spruce."
    without = chat_templates.source(name, None, set(), begins=False)
    assert "eos_token" in without and chat_templates.fault(without) is None, "what ends an answer is a token of any model"


def prompt_of(model, said: list) -> str:
    """What the playground writes for a conversation with the result of a job."""
    adapter = Adapter(strategy="lora", path=said[-1].path, sha256=said[-1].adapter_sha256)
    engine = Engine(ModelPool(device="cpu"))
    try:
        tuned = model.model_copy(update={"adapters": (adapter,), "kind": said[-1].kind})
        return next(iter(engine.answer(request(tuned, ASKED))))[0].rendered_prompt
    finally:
        engine.close()


@pytest.mark.parametrize("name", FOREIGN)
def test_the_result_carries_the_template_it_was_trained_with(data_dir: Path, tiny_model: Path, name: str) -> None:
    bare = data_dir / "models" / "tiny"  # a base without any template
    shutil.copytree(tiny_model, bare)
    (bare / "chat_template.jinja").unlink()
    model = put_model(tiny_model, kind="generic")
    spec = order(model, put_dataset(chat_rows()), chat_template=name, **{**TEN, "max_steps": 2})
    tokenizer = load_tokenizer(model)
    assert not tokenizer.chat_template
    lesson = objective_of(spec, tokenizer)
    first = lesson.train.only({1})
    text, learned = tokenizer.decode(first.ids.tolist()), tokenizer.decode(first.ids[first.trained].tolist())
    asked, answer = (message["content"] for message in chat_rows(1)[0]["messages"])
    end = "<|im_end|>"  # the small model's end of text: it has no token of the template's own
    opening = {
        "llama3": "user<|end_header_id|>\n\n",
        "gemma": "<start_of_turn>user\n",
        "alpaca": "### Instruction:\n",
        "plain": "### User:\n",
    }
    assert text.startswith({"llama3": "<|start_header_id|>"}.get(name, "") + opening[name] + asked) and learned == answer + end

    said = run(spec, data_dir)
    logged = " ".join(e.message for e in of(said, events.Log))
    assert f"The chat template is {name}; an answer ends with {end}." in logged and "plain one" not in logged
    assert said[-1].kind == "dialogue"
    for folder in (data_dir / said[-1].path, data_dir / of(said, events.Saved)[-1].path / "weights"):
        carried = AutoTokenizer.from_pretrained(folder)
        assert carried.apply_chat_template(ASKED, tokenize=False, add_generation_prompt=True) == prompt_of(model, said)
        assert carried.chat_template == chat_templates.source(name, None, set(), begins=False)


def test_a_template_of_ones_own_is_trained_and_kept(data_dir: Path, tiny_model: Path) -> None:
    own = (
        "{% generation %}{% endgeneration %}{%- for m in messages %}{{ m.role | upper }}> {{ m.content }}{{ eos_token }} {% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT> ' }}{% endif %}"
    )
    model = put_model(tiny_model)
    spec = order(model, put_dataset(chat_rows()), chat_template="jinja", chat_template_jinja=own, **{**TEN, "max_steps": 2})
    assert type(spec).model_validate(json.loads(spec.model_dump_json())) == spec
    assert prompt_of(model, run(spec, data_dir)) == "SYSTEM> Be brief. <|im_end|> USER>  What wood?<|im_end|> ASSISTANT> "


def test_a_template_that_ends_no_answer_is_told(data_dir: Path, tiny_model: Path) -> None:
    endless = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    spec = order(put_model(tiny_model), put_dataset(chat_rows()), chat_template="jinja", chat_template_jinja=endless)
    assert "nothing teaches the model to stop" in " ".join(objective_of(spec, load_tokenizer(spec.model)).remarks())


def test_a_template_that_never_ends_stops_the_job(data_dir: Path, tiny_model: Path) -> None:
    mill = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in messages %}{% endfor %}{% endfor %}{% endfor %}"
    spec = order(put_model(tiny_model), put_dataset(chat_rows(2)), chat_template="jinja", chat_template_jinja=mill)
    with pytest.raises(Exception, match="so it was stopped"):
        objective_of(spec, load_tokenizer(spec.model))


def test_the_models_own_is_the_default(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    assert prepare_tokenizer(tokenizer, RunSettings()) is False and tokenizer.chat_template == CHAT_TEMPLATE
    assert prepare_tokenizer(tokenizer, RunSettings(chat_template="chatml")) is False
    assert tokenizer.apply_chat_template(TOLD, tokenize=False, add_generation_prompt=True) == WRITTEN["chatml"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"chat_template": "jinja"}, "It is missing: write the template"),
        ({"chat_template_jinja": "{{ messages }}"}, "for chat_template jinja, and chat_template is model"),
        ({"chat_template": "jinja", "chat_template_jinja": "{% for m in messages %}"}, "Line 1: Unexpected end of template"),
        ({"chat_template": "jinja", "chat_template_jinja": "Hello"}, "never reads messages"),
        ({"chat_template": "jinja", "chat_template_jinja": "{{ " + "(" * 3000 + "messages" + ")" * 3000 + " }}"}, "nested too deeply"),
        ({"chat_template": "jinja", "chat_template_jinja": "{{ messages }}" * 1000}, "at most 8000 characters"),
        ({"chat_template": "vicuna"}, "chatml"),
    ],
)
def test_what_is_no_template_is_refused(settings: dict, said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        RunSettings(**settings)
