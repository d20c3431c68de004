"""Conversations of several turns: a model's tool calls are answered by simulated tools, and it goes on from the results.

What the model writes in any turn is drawn and trained; the results, and what the chat template writes around them, are not.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple

from app.graders import SimulatedTools, calls_in, item_of, without_calls
from worker.data.batching import Row
from worker.data.chat_template import ids_behind_answer, sample_of
from worker.scoring.held_out import HeldOutPrompt
from worker.scoring.sampler import DrawnAnswer

MAX_CALLS = 8
"""Calls of one turn that are answered; a turn with more is the last."""


class Spoken(NamedTuple):
    """An answer to a prompt, of one turn or of several, with the results of tools between them."""

    prompt: int  # its place
    ids: list[int]
    drawn: list[bool]  # of each token, whether the model drew it
    nats: list[float]  # of these, minus their log-probabilities; none where they are not known
    ended: bool
    text: str  # of the last turn
    shown: str  # all turns and results, for people
    calls: tuple[dict[str, Any], ...] | None = None  # of all turns; None where only those in the text count
    before: tuple[dict[str, Any], ...] = ()  # messages between the prompt and the last turn


class ToolTalk(NamedTuple):
    """What conversations need besides a model."""

    tokenizer: Any
    kind: str  # of the model
    tools: SimulatedTools
    turns: int
    answer_tokens: int  # of a turn
    room: int  # tokens of a whole conversation, virtual ones included


class Asked(NamedTuple):
    """A prompt of a conversation: its row, what is asked, and its ids, virtual tokens included."""

    row: Row
    asked: HeldOutPrompt
    ids: list[int]


Draw = Callable[[list[list[int]], int], Generator[float, None, list[DrawnAnswer]]]
"""An answer to each of some texts; the number says which turn it is."""
TextOf = Callable[[HeldOutPrompt, list[int]], str]


def conversing(
    talk: ToolTalk, prompts: Sequence[Asked], spoken: Sequence[Spoken], draw: Draw, text_of: TextOf
) -> Generator[float, None, list[Spoken]]:
    """The conversations that begin with the turns `spoken`: each goes on while it calls tools that can be answered, until its turns are used or
    there is no room for the results and an answer. Raises BadData where the template does not show where an answer ends."""
    found = [one._replace(calls=tuple(calls_in(one.text))) if prompts[one.prompt].asked.tools else one for one in spoken]
    active = list(range(len(found)))
    for turn in range(1, talk.turns):
        told = {number: _with_results(talk, prompts[found[number].prompt], found[number]) for number in active}
        going = {number: one for number, one in told.items() if one is not None}
        for number, one in going.items():
            found[number] = one
        active = [number for number, one in going.items() if one.ended]
        if not active:
            break
        answers = yield from draw([[*prompts[found[number].prompt].ids, *found[number].ids] for number in active], turn)
        for number, answer in zip(active, answers, strict=True):
            found[number] = _with_turn(found[number], answer, text_of(prompts[found[number].prompt].asked, answer.ids))
    return found


def _with_results(talk: ToolTalk, prompt: Asked, one: Spoken) -> Spoken | None:
    """The conversation with the results of the calls of its last turn; not `ended` where there is no room for them; None where nothing is to be
    answered."""
    calls = calls_in(one.text)
    item = item_of(prompt.row.row, prompt.asked.text, prompt.asked.reference)
    if not one.ended or not 0 < len(calls) <= MAX_CALLS or not prompt.asked.tools or not talk.tools.answers_for(item):
        return None
    offset = len(one.calls or ()) - len(calls)
    calls = [{**call, "id": f"call_{offset + place}"} for place, call in enumerate(calls)]
    results = [talk.tools.answer(call["function"]["name"], call["function"]["arguments"], item) for call in calls]
    messages = [
        {"role": "assistant", "content": without_calls(one.text), "tool_calls": calls},
        *(
            {"role": "tool", "tool_call_id": call["id"], "name": call["function"]["name"], "content": result}
            for call, result in zip(calls, results, strict=True)
        ),
    ]
    asked, _ = sample_of(prompt.row.row, talk.kind)
    begun = [{"role": "user", "content": asked}] if isinstance(asked, str) else list(asked)
    before = (*one.before, *messages)
    ids = ids_behind_answer(talk.tokenizer, [*begun, *before], list(prompt.asked.tools))
    if len(prompt.ids) + len(one.ids) + len(ids) + talk.answer_tokens > talk.room:
        return one._replace(ended=False)
    shown = "\n".join([one.shown, *(f"→ {result}" for result in results)])
    return one._replace(ids=[*one.ids, *ids], drawn=[*one.drawn, *[False] * len(ids)], shown=shown, before=before)


def _with_turn(one: Spoken, answer: DrawnAnswer, text: str) -> Spoken:
    return one._replace(
        ids=[*one.ids, *answer.ids],
        drawn=[*one.drawn, *[True] * len(answer.ids)],
        nats=[*one.nats, *answer.nats],
        ended=answer.ended,
        text=text,
        shown=f"{one.shown}\n{text}",
        calls=(*(one.calls or ()), *calls_in(text)),
    )
