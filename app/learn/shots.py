"""Zero-shot and few-shot: a task without an example, and with a few."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from app.languages import mark
from app.learn._scored import ScoredPrompt, ScoredPromptsStop
from app.prompts.service import PromptBody

TASK = "Write the opposite.\n\n{{examples}}{{input}}:"
EXAMPLE = "{{input}}: {{answer}}"


def shots_body(count: int) -> PromptBody:
    """The task with `count` solved examples before the question; the answer is the first line, and must be the word alone."""
    shots = {"builder": "few_shot", "shots": count} if count else {"builder": "zero_shot"}
    return PromptBody(
        template=TASK if count else TASK.replace("{{examples}}", ""),
        example=EXAMPLE,
        separator="\n",
        extract="first_line",
        max_tokens=8,
        **shots,
    )


class ShotsStop(ScoredPromptsStop):
    name: ClassVar = "shots"
    title: ClassVar = mark("Zero-shot and few-shot")
    place: ClassVar = 50
    idea: ClassVar = mark(
        "A general model does decently with little data of yours: with none (zero-shot), or with a few examples in the prompt (few-shot). "
        "Nothing is trained either way."
    )
    do: ClassVar = mark(
        "The model is to write opposites: “hot: cold”. It gets the task without an example, with two and with six, as a text that it "
        "continues, and is right where it writes the word alone."
    )
    words: ClassVar = ("Zero-shot", "Few-shot", "Context window", "Accuracy")
    samples: ClassVar = ("opposites",)
    prompts: ClassVar[Mapping[str, ScoredPrompt]] = {
        "zero": ScoredPrompt(mark("Zero-shot"), shots_body(0), raw=True),
        "two": ScoredPrompt(mark("Two examples"), shots_body(2), raw=True),
        "six": ScoredPrompt(mark("Six examples"), shots_body(6), raw=True),
    }
    button: ClassVar = mark("Score all three")
