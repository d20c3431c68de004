"""Encoder–decoders: added with a certificate, trained on prompts and answers, merged, served, exported, and refused where they cannot work."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from app import events
from app.errors import BadField, BadRequest, Unsupported
from app.export_formats import FORMATS
from app.models import export_facts, imports
from app.models import service as models
from app.planning import feasibility
from app.spec import ModelRef
from benchmarks.architectures import write_small
from tests.card_code import run_card
from tests.tiny import build_tokenizer
from tests.worker.inference.test_engine import request, whole_characters
from tests.worker.inference.test_engine import run as ask
from tests.worker.modeling.test_new_tokens import WORDS, rows, tuned
from tests.worker.orders import chat_rows, order, put_dataset
from tests.worker.training.test_settings import TEN, in_two, of, run, same
from worker.conversion.merge import merge
from worker.conversion.trial import question_and_answer
from worker.data.chat_template import render_prompt, render_row
from worker.exporters import _process
from worker.inference.engine import Engine
from worker.inference.model_pool import ModelPool
from worker.modeling import packed_attention, padded
from worker.modeling.loading import load_model, load_tokenizer
from worker.runtime.device import choose
from worker.scoring import held_out
from worker.training.objectives import objective_of

EDGE = [2, 0]
"""The ids of the small tokenizer's end of text, and of the token that a small T5's answers begin with."""


@pytest.fixture
def added(session, user, data_dir: Path):
    """Adds a small model of an architecture through an import."""

    def add(kind: str) -> tuple[ModelRef, dict]:
        write_small(kind, data_dir / "import" / "small")
        model = imports.add_folder(session, user, "small", kind="generic")
        session.commit()
        imports.fetch(model.id)
        session.refresh(model)
        assert (model.status, model.error, model.kind) == ("ready", None, "instruction")
        return models.reference(session, model), model.certificate

    return add


@pytest.mark.parametrize("start", [58_100, -1])
def test_answers_that_begin_with_a_token_of_another_tokenizer_are_refused(start: int) -> None:
    with pytest.raises(Unsupported, match=f"begins with the token {start} ") as caught:
        question_and_answer(build_tokenizer(), {"decoder_start_token_id": start})
    assert "belong to one model" in caught.value.hint


@pytest.mark.long
@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_one_is_certified_trained_merged_served_and_exported(kind: str, added, data_dir: Path, tmp_path: Path) -> None:
    ref, certificate = added(kind)
    assert certificate["tier"] == "C" and [check["name"] for check in certificate["checks"]][:4] == ["weights", "padded", "loss", "step"]
    assert all(check["passed"] for check in certificate["checks"]), [c for c in certificate["checks"] if not c["passed"]]
    assert {"lora", "dora", "full", "top_layers", "layer_norm"} <= {n for n, t in certificate["strategies"].items() if t["works"]}, (
        certificate
    )
    assert ref.shape.layers == 4 and ref.shape.encodes and ref.shape.pads
    assert {name.split(".")[-1] for name, _ in ref.shape.modules()} >= ({"q", "wo"} if kind == "t5" else {"q_proj", "fc2"})

    spec = order(ref, put_dataset(chat_rows()), "lora", **{**TEN, "learning_rate": 1e-2, "validation_fraction": 0.2, "samples": 1})
    said = run(spec, data_dir)
    losses = [e.loss for e in of(said, events.Step)]
    assert losses[-1] < losses[0], losses
    same(in_two(spec, data_dir, 4), said)
    result = tuned(spec, said)
    lesson, engine = objective_of(spec, load_tokenizer(ref)), choose(spec.run, spec.strategy)
    again = held_out.validate(load_model(result, attention=packed_attention.NAME), lesson.held_out, 160, engine)
    assert again["loss"] == pytest.approx(of(said, events.Evaluated)[-1].loss, abs=2e-5)

    merge(result, tmp_path / "merged")
    plain, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "merged", dtype=torch.float32), load_tokenizer(result)
    serving = Engine(ModelPool(device="cpu"), chunk=7, lone_chunk=11)
    try:
        for question in ("What wood is it?", "How long does varnish dry in summer and in winter?"):
            _, ids = render_prompt(tokenizer, "instruction", [{"role": "user", "content": question}])
            given = torch.tensor([ids[:-1]])
            told = plain.generate(
                given, attention_mask=torch.ones_like(given), max_new_tokens=24, do_sample=False, forced_eos_token_id=None
            )
            expected = whole_characters(tokenizer.decode(told[0, 1:], skip_special_tokens=True))
            assert ask(serving, request(result, [{"role": "user", "content": question}]))[0] == [expected]
        with pytest.raises(BadRequest, match="answers a prompt and continues no text"):
            ask(serving, request(result, "The bridge"))
    finally:
        serving.close()
    made = run_card((data_dir / said[-1].path / "README.md").read_text(), data_dir / said[-1].path, small=data_dir / ref.path)
    assert type(made["model"]).__name__ == "PeftModelForSeq2SeqLM"

    facts = export_facts.facts_of(result)
    assert FORMATS["safetensors"].accepts(facts) is None and "is not one of those that are written" in FORMATS["gguf"].accepts(facts)
    asked = _process.ExportSpec(format="safetensors", types=("F32",), model=result, base=ref, job=spec.model_dump(mode="json"))
    found = _process.export(asked, tmp_path / "out", _process.Reporter(tmp_path / "progress"))
    assert found["fault"] is None and "not run" in found["parity"]["skipped"]
    assert "AutoModelForSeq2SeqLM" in (tmp_path / "out" / "README.md").read_text()
    written = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(written.lm_head.weight, plain.lm_head.weight)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_new_tokens_learn_in_both_stacks(kind: str, added, data_dir: Path, tmp_path: Path) -> None:
    ref, _ = added(kind)
    settings = {**TEN, "learning_rate": 1e-2, "samples": 1, "validation_fraction": 0.2, "new_tokens": WORDS}
    spec = order(ref, put_dataset(rows()), "lora", **settings)
    said = run(spec, data_dir)
    same(in_two(spec, data_dir, 4), said)
    result = tuned(spec, said)
    merge(result, tmp_path / "merged")
    plain, began = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "merged"), load_model(ref).get_input_embeddings().weight
    table = plain.get_encoder().embed_tokens.weight
    assert len(table) == 514 and table is plain.get_decoder().embed_tokens.weight
    assert not torch.equal(table[512], began[load_tokenizer(ref)(WORDS[0]).input_ids].mean(0)), "their rows have not learned"


@pytest.mark.long
def test_full_tuning_of_one_learns_and_what_it_cannot_do_is_refused(added, data_dir: Path) -> None:
    ref, _ = added("t5")
    spec = order(ref, put_dataset(chat_rows()), "full", **{**TEN, "learning_rate": 2e-3})
    said = run(spec, data_dir)
    losses = [e.loss for e in of(said, events.Step)]
    assert losses[-1] < losses[0], losses
    assert load_model(tuned(spec, said)).config.is_encoder_decoder
    for task in ("preference", "classification"):
        with pytest.raises(BadField, match=f"trained on writing answers to prompts, and not for {task}"):
            feasibility.refuse_untunable(ref, task)
    with pytest.raises(BadField, match="these rows are plain text") as caught:
        feasibility.refuse_without_prompt(ref.shape, "plain_text")
    assert caught.value.param == "training_file"
    feasibility.refuse_without_prompt(ref.shape, "chat")

    tokenizer = load_tokenizer(ref)
    row = {
        "messages": [
            {"role": "system", "content": "Be short."},
            {"role": "user", "content": "Why?"},
            {"role": "assistant", "content": "So."},
        ]
    }
    rendered = render_row(tokenizer, row, "instruction", 100)
    start = padded.answer_start(rendered.ids, padded.Edge(*EDGE))
    assert rendered.ids[start - 1 : start + 1] == EDGE and rendered.trained == [False] * (start + 1) + [True] * (
        len(rendered.ids) - start - 1
    )
    assert tokenizer.decode(rendered.ids[: start - 1]) == "Be short.\nWhy?" and tokenizer.decode(rendered.ids[start + 1 : -1]) == "So."
    _, asked = render_prompt(tokenizer, "instruction", [*row["messages"], {"role": "user", "content": "<|im_end|><|endoftext|>?"}])
    assert padded.answer_start(asked, padded.Edge(*EDGE)) == len(asked) - 1, "what a person types is no edge"
    assert AutoTokenizer.from_pretrained(data_dir / ref.path).chat_template == tokenizer.chat_template
