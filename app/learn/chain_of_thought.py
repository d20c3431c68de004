"""Chain of thought: a worked example makes a model go step by step. Two word problems, and honest scores on others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple

from sqlalchemy.orm import Session

from app.datasets import samples
from app.inference.protocol import Entry
from app.kit.answers import number_in
from app.languages import gettext, mark
from app.learn import _asking, _visits
from app.learn._base import Need, StartedStop, Stop, StopResult, StopText, Typed
from app.learn._scored import ScoredPrompt, scored_result, start
from app.prompts import runs as prompt_runs
from app.prompts.service import STARTS, PromptBody, take
from app.tables import StopVisit, User


class WordProblem(NamedTuple):
    """A word problem, how it is reasoned out, and its answer."""

    title: str
    question: str
    steps: str
    answer: float

    def worked(self) -> str:
        return f"Question: {self.question}\nReasoning: {self.steps}\n#### {self.answer:g}\n\n"


PENS = WordProblem(
    "Pens",
    "I have 10 pens and buy 5 boxes of pens with 15 in each. How many pens do I have?",
    "5 boxes of 15 pens are 75 pens. 10 + 75 = 85.",
    85,
)
COWS = WordProblem(
    "Cows",
    "A farmer has 90 cows. He sells 15 of them and then buys twice as many as he sold. How many cows has he now?",
    "After the sale there are 90 - 15 = 75 cows. He buys 2 times 15, which is 30. 75 + 30 = 105.",
    105,
)
AT_ONCE = "{question}\nAnswer with the number only."
STEPS = "{worked}Question: {question}\nReasoning:"
CHAIN = {**STARTS["chain_of_thought"], "template": STEPS.format(worked=PENS.worked(), question="{{input}}"), "max_tokens": 80}
ROWS = 8
ASKED = (mark("Pens at once"), mark("Pens with steps"), mark("Cows at once"), mark("Cows with steps"))
"""Keys of the exchanges, and their titles."""


class ChainOfThoughtStop(Stop):
    name: ClassVar = "chain-of-thought"
    title: ClassVar = mark("Chain of thought")
    place: ClassVar = 70
    idea: ClassVar = mark(
        "A prompt with a worked example makes a model reason step by step before it answers. It helps with arithmetic, common sense and "
        "symbols, in large models. In self-consistency several chains are drawn, and the most frequent answer counts."
    )
    do: ClassVar = mark(
        "Two word problems are asked with and without a worked example, then eight others of the sample are scored: answered at once, with "
        "the worked example, and by the majority of three chains."
    )
    words: ClassVar = ("Chain-of-thought", "Sampling", "Temperature", "Hallucination")
    needs: ClassVar[tuple[Need, ...]] = ("writes",)
    samples: ClassVar = ("word-problems",)
    button: ClassVar = mark("Ask and score")
    prompts: ClassVar[Mapping[str, ScoredPrompt]] = {
        "at_once": ScoredPrompt(
            mark("At once"),
            PromptBody(
                template=AT_ONCE.format(question="{{input}}"), extract="last_number", reference="after", score="numeric", max_tokens=16
            ),
        ),
        "chain": ScoredPrompt(mark("Worked example"), PromptBody(**CHAIN)),
        "majority": ScoredPrompt(mark("Majority of three chains"), PromptBody(**CHAIN | {"samples": 3, "temperature": 0.7})),
    }

    def begin(self, session: Session, user: User, typed: Typed, visit: StopVisit | None) -> StartedStop:
        model = _visits.take_model(session, user, "writes")
        dataset = samples.add(session, user, self.samples[0])
        order = prompt_runs.RunOrder(part="all", rows=ROWS)
        runs = {key: start(session, user, self.title, one, model, dataset, order) for key, one in self.prompts.items()}
        begun = StartedStop({"exchanges": {}, "runs": {key: str(run.id) for key, run in runs.items()}, "model": model.name})
        for problem, other in ((PENS, COWS), (COWS, PENS)):
            asked = {
                f"{problem.title} at once": AT_ONCE.format(question=problem.question),
                f"{problem.title} with steps": STEPS.format(worked=other.worked(), question=problem.question),
            }
            for key, prompt in asked.items():
                exchange, begun.asked[key] = _asking.ask(session, user, model.name, prompt, tokens=96)
                begun.refs["exchanges"][key] = str(exchange.id)
        return begun

    def heard(self, session: Session, user: User, begun: StartedStop, entries: Mapping[str, Sequence[Entry]]) -> None:
        _asking.record(session, begun, entries)

    def look(self, session: Session, user: User, visit: StopVisit) -> StopResult:
        result = scored_result(session, user, visit, self.prompts)
        titles = {key: gettext(key) for key in ASKED}
        found = _asking.answers(session, user, visit, titles)
        graded = [
            _graded(problem, found[key]) for problem in (PENS, COWS) for key in titles if key.startswith(problem.title) and key in found
        ]
        result.texts = [*graded, *result.texts]
        result.fault = result.fault or _asking.fault_of(session, visit)
        if result.ended:
            result.notes.append(
                gettext("Wei et al. 2022 found the gain in models of about 100 billion parameters, and none in small ones.")
            )
        return result


def _graded(problem: WordProblem, said: StopText) -> StopText:
    """An answer with whether its number is right: the one after ####, or the last one."""
    found = take(said.text, "after" if "####" in said.text else "last_number", "####").splitlines()
    value = number_in(found[0]) if found else None
    note = gettext("%(note)s. Right is %(answer)s.", note=said.note, answer=f"{problem.answer:g}")
    return said._replace(right=value is not None and value == problem.answer, note=note)
