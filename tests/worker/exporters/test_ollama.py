"""Modelfiles, and chat templates in Go next to the same in Jinja."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.errors import Unsupported
from tests.worker.exporters import go_template
from tests.worker.exporters.models import build, gemma_tokenizer
from worker import exporters
from worker.exporters import _go_template
from worker.exporters._base import ExportOptions

SMOLLM = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful AI "
    "assistant named SmolLM<|im_end|>\n' }}{% endif %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' "
    "+ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tokenizer_with(family: str):
    from app import chat_templates

    tokenizer = gemma_tokenizer()
    ends = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>"}.get(family)
    if ends:
        tokenizer.add_special_tokens({"additional_special_tokens": [ends]})
    special = set(tokenizer.all_special_tokens) | {str(t) for t in tokenizer.added_tokens_decoder.values()}
    tokenizer.chat_template = chat_templates.source(family, None, special, True)
    return tokenizer


@pytest.mark.parametrize("family", list(_go_template.FAMILIES))
def test_both_languages_give_the_same_prompt(family: str):
    tokenizer = tokenizer_with(family)
    found = _go_template.find(tokenizer)
    assert found.family == family and found.system == ""
    for messages in _go_template.CONVERSATIONS:
        expected = _go_template.render(tokenizer, messages)
        assert go_template.render(found.template, messages) == expected and expected.count("How long") == 1


def test_a_system_prompt_of_the_template_becomes_the_modelfiles(tmp_path: Path):
    folder = build(tmp_path / "m", "llama")
    (folder / "chat_template.jinja").write_text(SMOLLM)
    (tmp_path / "out").mkdir()
    options = ExportOptions(name="lab/smol", types=("Q8_0",), license="apache-2.0")
    made = exporters.get("ollama").write(folder, tmp_path / "out", options, lambda *_: None)
    assert [w.name for w in made] == ["lab-smol-Q8_0.gguf", "Modelfile"]
    text = (tmp_path / "out" / "Modelfile").read_text()
    assert text.startswith("FROM ./lab-smol-Q8_0.gguf\nTEMPLATE ") and 'LICENSE """apache-2.0"""' in text
    assert 'SYSTEM """You are a helpful AI assistant named SmolLM"""' in text
    assert 'PARAMETER stop "<|im_end|>"' in text and 'PARAMETER stop "<|im_start|>"' in text and "PARAMETER num_ctx 512" in text
    ours = exporters.get("ollama").write(folder, tmp_path / "out", options.model_copy(update={"system": "Be brief."}), lambda *_: None)
    assert ours and 'SYSTEM """Be brief."""' in (tmp_path / "out" / "Modelfile").read_text()


@pytest.mark.long
@pytest.mark.starter
def test_the_starters_template_is_the_same_in_go(starter_model: Path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(starter_model)
    found = _go_template.find(tokenizer)
    for messages in _go_template.CONVERSATIONS:
        asked = messages if messages[0]["role"] == "system" else [{"role": "system", "content": found.system}, *messages]
        assert go_template.render(found.template, asked) == _go_template.render(tokenizer, messages)
    assert found.system.startswith("You are a helpful AI assistant named SmolLM")


def test_a_template_that_is_none_of_the_families_is_refused_before_anything_is_written(tmp_path: Path):
    folder = build(tmp_path / "m", "llama")
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text().replace("'<|im_end|>' + '\n'", "'<|im_end|>'"))
    (tmp_path / "out").mkdir()
    with pytest.raises(Unsupported, match=r"none of those known in Ollama's language .* differs from chatml from character \d+"):
        exporters.get("ollama").write(folder, tmp_path / "out", ExportOptions(name="t", types=("F16",)), lambda *_: None)
    assert list((tmp_path / "out").iterdir()) == []


def test_three_quotation_marks_are_refused(tmp_path: Path):
    from worker.exporters.ollama import quoted

    with pytest.raises(Unsupported, match="three quotation marks"):
        quoted('a """ b')
    assert quoted("a") == '"""a"""'


def test_a_model_without_a_template_continues_text():
    tokenizer = gemma_tokenizer()
    tokenizer.chat_template = None
    assert _go_template.find(tokenizer) == _go_template.GoTemplate("", "{{ .Prompt }}", ())
