"""Rows with tool calls, read by a base whose chat template knows none and by the model that was made of it."""

from __future__ import annotations

import pytest

from app import chat_templates
from app.errors import BadData
from tests.tiny import CHAT_TEMPLATE, build_tokenizer
from worker.data.chat_template import render_row
from worker.evaluation.scoring import lend_template

HERMES = chat_templates.source("hermes", None, {"<|im_end|>"}, begins=False)
ROW = {
    "messages": [
        {"role": "user", "content": "What does it weigh?"},
        {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "weigh", "arguments": "{}"}}]},
    ]
}


@pytest.mark.parametrize(
    ("of_own", "of_base", "then"),
    [(HERMES, CHAT_TEMPLATE, HERMES), (CHAT_TEMPLATE, CHAT_TEMPLATE, CHAT_TEMPLATE), (CHAT_TEMPLATE, HERMES, HERMES)],
)
def test_a_base_that_writes_no_calls_is_asked_with_the_template_of_the_tuned(of_own: str, of_base: str, then: str) -> None:
    own, base = build_tokenizer(), build_tokenizer()
    own.chat_template, base.chat_template = of_own, of_base
    lend_template(own, base)
    assert (own.chat_template, base.chat_template) == (of_own, then)


def test_only_then_can_it_read_the_row() -> None:
    own, base = build_tokenizer(), build_tokenizer()
    own.chat_template = HERMES
    with pytest.raises(BadData, match="leaves the tool call"):
        render_row(base, ROW, "dialogue", 999)
    lend_template(own, base)
    assert render_row(base, ROW, "dialogue", 999) == render_row(own, ROW, "dialogue", 999)
