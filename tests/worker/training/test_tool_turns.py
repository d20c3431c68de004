"""Conversations with simulated tools: the tokens are those of the chat template, the results are not trained, and whole jobs."""

from __future__ import annotations

import copy
import json
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from app import events
from app.errors import BadData
from app.graders import SimulatedTools
from app.settings import get_settings
from app.spec import JobSpec, ModelRef
from tests.tiny import AGENT_TEMPLATE
from tests.worker.orders import order, put_dataset, put_model
from tests.worker.training.test_reinforcement import settings
from tests.worker.training.test_train import of, run
from worker.data.batching import Row
from worker.data.chat_template import render_row
from worker.runtime.progress import drained
from worker.scoring import held_out
from worker.scoring.held_out import HeldOutPrompt
from worker.scoring.sampler import DrawnAnswer
from worker.training.tool_turns import Asked, Spoken, ToolTalk, conversing

pytestmark = pytest.mark.timeout(240)
TOOL = {"type": "function", "function": {"name": "wood", "parameters": {"type": "object", "properties": {"part": {"type": "string"}}}}}
TABLE = [{"name": "wood", "arguments": {"part": part}, "result": wood} for part, wood in (("belly", "spruce"), ("back", "maple"))]


def row_of(part: str, **more: Any) -> dict[str, Any]:
    wood = "spruce" if part == "belly" else "maple"
    said = [{"role": "user", "content": f"The {part}?"}, {"role": "assistant", "content": wood}]
    return {"messages": said, "tools": [TOOL], "metadata": {"tool_results": TABLE}} | more


@pytest.fixture
def tokenizer(tokenizer):
    """One of the test's own: the other tests of the process share theirs."""
    own = copy.deepcopy(tokenizer)
    own.chat_template = AGENT_TEMPLATE
    return own


def call(part: str, name: str = "wood") -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": json.dumps({"part": part})}}


def written(*parts: str) -> str:
    return "".join(f'\n<tool_call>\n{{"name": "wood", "arguments": {{"part": "{part}"}}}}\n</tool_call>' for part in parts)


class Conversation:
    """One conversation about a row, whose answers are these texts."""

    def __init__(self, tokenizer: Any, row: dict[str, Any], *texts: str, turns: int = 4, room: int = 480, source: str = "") -> None:
        self.tokenizer, self.row, self.texts = tokenizer, row, list(texts)
        (asked,) = held_out.questions(tokenizer, [Row(1, row)], "dialogue", 1, 400)
        self.prompt = Asked(Row(1, row), asked, asked.ids)
        self.talk = ToolTalk(tokenizer, "dialogue", SimulatedTools(source), turns, 60, room)
        self.texts_drawn_behind: list[list[int]] = []

    def answer(self) -> DrawnAnswer:
        ids = self.tokenizer(self.texts.pop(0) + "<|im_end|>", add_special_tokens=False).input_ids
        return DrawnAnswer(ids, [0.5] * len(ids), True)

    def text_of(self, asked: HeldOutPrompt, ids: list[int]) -> str:
        return held_out.as_text(self.tokenizer, asked, [i for i in ids if i != self.tokenizer.eos_token_id])

    def draw(self, texts: list[list[int]], turn: int) -> Generator[float, None, list[DrawnAnswer]]:
        yield 0.0
        self.texts_drawn_behind += texts
        return [self.answer() for _ in texts]

    def spoken(self) -> Spoken:
        first = self.answer()
        text = self.text_of(self.prompt.asked, first.ids)
        begun = Spoken(0, first.ids, [True] * len(first.ids), first.nats, True, text, text)
        (found,) = drained(conversing(self.talk, [self.prompt], [begun], self.draw, self.text_of))
        return found


def test_a_conversation_has_the_tokens_that_the_template_writes(tokenizer: Any) -> None:
    """Token for token those of the whole conversation as a row, and what the model drew is what such a row trains."""
    talked = Conversation(tokenizer, row_of("belly"), written("belly"), written("back", "belly"), "spruce and maple")
    found = talked.spoken()
    said = [
        {"role": "user", "content": "The belly?"},
        {"role": "assistant", "content": "", "tool_calls": [call("belly")]},
        {"role": "tool", "content": "spruce"},
        {"role": "assistant", "content": "", "tool_calls": [call("back"), call("belly")]},
        {"role": "tool", "content": "maple"},
        {"role": "tool", "content": "spruce"},
        {"role": "assistant", "content": "spruce and maple"},
    ]
    whole = render_row(tokenizer, {"messages": said, "tools": [TOOL]}, "dialogue", 999)
    assert [*talked.prompt.ids, *found.ids] == whole.ids[: len(talked.prompt.ids) + len(found.ids)]
    assert found.drawn == whole.trained[len(talked.prompt.ids) :][: len(found.drawn)] and 0 < sum(found.drawn) < len(found.drawn)
    assert len(found.nats) == sum(found.drawn) and found.ended and found.text == "spruce and maple" and not talked.texts
    assert [json.loads(one["function"]["arguments"])["part"] for one in found.calls or ()] == ["belly", "back", "belly"]
    assert "→ maple" in found.shown and found.shown.endswith("spruce and maple")
    assert talked.texts_drawn_behind[0][: len(talked.prompt.ids)] == talked.prompt.ids


def test_a_call_without_a_result_is_told_so(tokenizer: Any) -> None:
    talked = Conversation(tokenizer, row_of("belly"), written("neck"), "I do not know")
    assert "has no result for these arguments" in talked.spoken().shown and not talked.texts


def test_a_function_answers_calls(tokenizer: Any) -> None:
    source = "def call(name, arguments, item):\n    return {'wood': item['reference'] + '!', 'of': arguments['part']}"
    talked = Conversation(tokenizer, row_of("back"), written("back"), "maple", source=source)
    assert '→ {"wood": "maple!", "of": "back"}' in talked.spoken().shown


def test_a_conversation_ends_with_its_turns_and_its_room(tokenizer: Any) -> None:
    talked = Conversation(tokenizer, row_of("belly"), *[written("belly")] * 5, turns=3)
    assert talked.spoken().ended and len(talked.texts) == 2, "three turns"
    narrow = Conversation(tokenizer, row_of("belly"), *[written("belly")] * 5)
    narrow.talk = narrow.talk._replace(room=len(narrow.prompt.ids) + 190)
    found = narrow.spoken()
    assert not found.ended and 1 <= 5 - len(narrow.texts) < 4 and len(narrow.prompt.ids) + len(found.ids) <= narrow.talk.room
    silent = Conversation(tokenizer, row_of("belly"), "spruce", written("belly"))
    assert silent.spoken().text == "spruce" and len(silent.texts) == 1, "no call, no further turn"


def test_rows_without_simulated_tools_are_said(data_dir: Path, tiny_model: Path) -> None:
    with pytest.raises(BadData, match="chat template writes no tool calls"):
        run(talking(put_model(tiny_model), [row_of("belly")] * 8, chat_template="model", chat_template_jinja=None), data_dir)
    with pytest.raises(BadData, match="No row has results in a column tool_results"):
        run(talking(put_model(tiny_model), [row_of("belly", metadata={})] * 8), data_dir)


def talking(model: ModelRef, rows: list[dict[str, Any]], task: str = "reinforcement", **more: Any) -> JobSpec:
    given = {
        "evaluations_per_epoch": 0, "validation_fraction": 0.25, "max_tokens_per_step": 512, "max_length": 400, "chat_template": "jinja",
        "chat_template_jinja": AGENT_TEMPLATE, **more,
    }  # fmt: skip
    spec = order(model, put_dataset(rows), "full", **given)
    if task == "generation":
        return spec
    reward = {"type": "python", "name": "right", "source": "def grade(sample, item):\n    called = len(sample['output_tools']) == 1\n"
              "    return 0.5 * called + 0.5 * (item['reference'] in sample['output_text'])"}  # fmt: skip
    own = settings(grader=reward, answer_tokens=60, max_turns=2, group_size=4, prompts_per_step=2)
    return spec.model_copy(update={"task": "reinforcement", "preference": own})


@pytest.mark.long
def test_a_model_learns_from_conversations_with_tools(data_dir: Path, tiny_model: Path) -> None:
    """After worked examples it calls; then whole conversations are drawn, graded by their calls and their last answer, and trained."""
    examples = []
    for i in range(24):
        part, wood = (("belly", "spruce"), ("back", "maple"))[i % 2]
        examples.append({"messages": [
            {"role": "user", "content": f"The {part}?"},
            {"role": "assistant", "content": "", "tool_calls": [call(part)]},
            {"role": "tool", "content": wood},
            {"role": "assistant", "content": wood},
        ], "tools": [TOOL], "metadata": {"number": i}})  # fmt: skip
    begun = run(talking(put_model(tiny_model), examples, "generation", epochs=24, learning_rate=5e-3), data_dir, "examples")
    tuned = put_model(tiny_model).model_copy(update={"path": begun[-1].path, "name": "tuned"})
    rows = [row_of(part) | {"metadata": {"tool_results": TABLE, "number": i}} for i in range(8) for part in ("belly", "back")]
    said = run(talking(tuned, rows, max_steps=3, epochs=9, learning_rate=1e-4, samples=2), data_dir)
    steps = of(said, events.Step)
    assert isinstance(said[-1], events.Finished) and len(steps) == 3
    assert all(step.metrics["ratio_std"] < 2e-3 and step.grad_norm > 0 for step in steps), [step.metrics for step in steps]
    assert sum(step.metrics["reward"] for step in steps) > 0.3, "it calls rightly now and then"
    drawn = sum(step.metrics["answer_length"] for step in steps) / 3
    assert drawn > 20, "the call and the answer behind its result"
    shown = [one for event in of(said, events.Sampled) for one in event.samples]
    assert any("<tool_call>" in one.answer and "→ " in one.answer for one in shown), [one.answer for one in shown]
    assert (get_settings().data_dir / said[-1].path).is_dir()
