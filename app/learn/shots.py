"""Zero-shot and few-shot: a task without an example, and with a few."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from app.learn._scored import ScoredPrompt, ScoredPromptsStop
from app.prompts.service import STARTS, PromptBody

TASK = "Classify the customer's message as one of: {{labels}}.\n\n"
LABELED = {"score": "label", "max_tokens": 12}


def shots_body(count: int) -> PromptBody:
    """The same task with `count` solved examples before the question."""
    if not count:
        return PromptBody(builder="zero_shot", template=TASK + "Message: {{input}}\nClass:", **LABELED)
    lines = {"template": TASK + "{{examples}}Message: {{input}}\nClass:", "example": "Message: {{input}}\nClass: {{answer}}"}
    return PromptBody(**{**STARTS["few_shot"], **lines, **LABELED, "shots": count, "choose": "balanced"})


class ShotsStop(ScoredPromptsStop):
    name: ClassVar = "shots"
    title: ClassVar = "Zero-shot and few-shot"
    place: ClassVar = 50
    idea: ClassVar = (
        "A general model does decently with little data of yours: with none (zero-shot), or with a few examples in the prompt (few-shot). "
        "Nothing is trained either way."
    )
    do: ClassVar = "The same question about the same customer messages, without an example, with two and with six."
    words: ClassVar = ("Zero-shot", "Few-shot", "Context window", "Accuracy")
    samples: ClassVar = ("shop-questions",)
    prompts: ClassVar[Mapping[str, ScoredPrompt]] = {
        "zero": ScoredPrompt("Zero-shot", shots_body(0)),
        "two": ScoredPrompt("Two examples", shots_body(2)),
        "six": ScoredPrompt("Six examples", shots_body(6)),
    }
    button: ClassVar = "Score all three"
