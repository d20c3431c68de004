"""Prompt design and prompt engineering: a vague, a clear and an engineered prompt on the same rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from app.learn._scored import ScoredPrompt, ScoredPromptsStop
from app.learn.shots import LABELED
from app.prompts.service import PromptBody

VAGUE = "What is this about?\n\n{{input}}"
CLEAR = "Which kind of request is this message to a music shop? Answer with one of: {{labels}}.\n\nMessage: {{input}}\nKind:"
ENGINEERED = (
    "You sort the mail of a shop for stringed instruments. Kinds and their keywords:\n{{keywords}}\n"
    "Examples:\n\n{{examples}}Message: {{input}}\nKind:"
)
KEYWORDS = (
    "delivery: arrive, ship, parcel, track\nlesson: teacher, learn, course, hour\npayment: invoice, card, pay, price\n"
    "rental: rent, hire, month, borrow\nrepair: broken, crack, buzz, fix\nreturn: send back, refund, exchange, money back"
)


class PromptDesignStop(ScoredPromptsStop):
    name: ClassVar = "prompt-design"
    title: ClassVar = "Prompt design and prompt engineering"
    place: ClassVar = 60
    idea: ClassVar = (
        "Prompt design makes a prompt for one task: clear and concise. Prompt engineering makes it perform better, with knowledge of the "
        "domain, examples of the output and keywords, and measures whether it does."
    )
    do: ClassVar = "A vague, a clear and an engineered prompt answer the same customer messages, and each is scored."
    words: ClassVar = ("Prompt design", "Prompt engineering", "Few-shot", "Accuracy")
    samples: ClassVar = ("shop-questions",)
    prompts: ClassVar[Mapping[str, ScoredPrompt]] = {
        "vague": ScoredPrompt("Vague", PromptBody(template=VAGUE, score="label", max_tokens=24)),
        "clear": ScoredPrompt("Clear", PromptBody(template=CLEAR, **LABELED)),
        "engineered": ScoredPrompt(
            "Engineered",
            PromptBody(
                builder="few_shot", template=ENGINEERED, example="Message: {{input}}\nKind: {{answer}}", shots=6, choose="similar",
                variables={"keywords": KEYWORDS}, **LABELED,
            ),
        ),
    }  # fmt: skip
    button: ClassVar = "Score all three"
