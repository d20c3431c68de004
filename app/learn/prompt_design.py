"""Prompt design and prompt engineering: a vague, a clear and an engineered prompt on the same rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from app.languages import mark
from app.learn._scored import ScoredPrompt, ScoredPromptsStop
from app.prompts.service import PromptBody

READ: dict[str, Any] = {"extract": "first_line", "max_tokens": 16}
ENGINEERED = "A list of words and their opposites. Keywords: antonym, contrary, one word.\n\n{{examples}}{{input}}:"


class PromptDesignStop(ScoredPromptsStop):
    name: ClassVar = "prompt-design"
    title: ClassVar = mark("Prompt design and prompt engineering")
    place: ClassVar = 60
    idea: ClassVar = mark(
        "Prompt design makes a prompt for one task: clear and concise. Prompt engineering makes it perform better, with knowledge of the "
        "domain, examples of the output and keywords, and measures whether it does."
    )
    do: ClassVar = mark(
        "Wanted is the opposite of a word, and that word alone. A vague and a clear prompt ask for it; the engineered one has keywords and six "
        "examples, and is sent as a text, since a small model continues a pattern better than it follows an instruction."
    )
    words: ClassVar = ("Prompt design", "Prompt engineering", "Few-shot", "Accuracy")
    samples: ClassVar = ("opposites",)
    prompts: ClassVar[Mapping[str, ScoredPrompt]] = {
        "vague": ScoredPrompt(mark("Vague"), PromptBody(template="{{input}}?", **READ)),
        "clear": ScoredPrompt(
            mark("Clear"), PromptBody(template="What is the opposite of “{{input}}”? Answer with one word only.", **READ)
        ),
        "engineered": ScoredPrompt(
            mark("Engineered"),
            PromptBody(
                builder="few_shot", template=ENGINEERED, example="{{input}}: {{answer}}", separator="\n", shots=6, choose="similar", **READ
            ),
            raw=True,
        ),
    }
    button: ClassVar = mark("Score all three")
