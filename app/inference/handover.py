"""Whether the engine that answers for a model computes that model: what it says is compared with the weights that are here.

A server may have loaded another revision or a coarse quantization, and one that was told of an adapter may answer with its base. So the
log-probabilities of the next token after a few texts are asked of it, of the model here, and of its base here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from app.errors import BadField, Unavailable
from app.inference import client, playground
from app.inference.playground import ResolvedModel
from app.inference.protocol import Entry, GenerateRequest, Logprob, PromptLogprobs, Sampling, TextPart
from app.languages import gettext, localized
from app.spec import ModelRef
from app.tables import User

PROMPTS = (
    "The bridge of a violin is made of",
    "Dear customer, thank you for your message. We",
    "Question: What is the capital of France?\nAnswer:",
    "def mean(values):\n    return",
    "Es war einmal ein",
    "1, 2, 3, 4,",
)
TOP, HERE = 5, 50
"""Likeliest next tokens that are asked of the engine, and of the weights here, where all of those should be found."""
FAR = 0.5
"""Nats per token that another precision explains; more is another model."""


class Distance(NamedTuple):
    """How far an engine's next tokens are from a model's: `nats` on average over the tokens that both list, `same` of the first choices."""

    nats: float
    same: int


async def check(user: User, who: ResolvedModel) -> dict[str, Any]:
    """The comparison for the API. Raises BadField for a model that the built-in engine answers, and what either side raises."""
    if who.engine is None:
        raise BadField(
            gettext("%(model)s is answered by the built-in engine.", model=who.name),
            hint=gettext("There is nothing to compare."),
            param="model",
        )
    theirs = [await _next_of_engine(_request(user, who, prompt)) for prompt in PROMPTS]
    tuned = distance(theirs, [await _next_here(_request(user, who, prompt), who.ref) for prompt in PROMPTS])
    base = None
    if who.ref.adapters:
        below = who.ref.model_copy(update={"adapters": who.ref.adapters[:-1]})
        base = distance(theirs, [await _next_here(_request(user, who, prompt), below) for prompt in PROMPTS])
    return {
        "prompts": len(PROMPTS),
        "same_first_token": tuned.same,
        "distance": round(tuned.nats, 4),
        "distance_to_base": base and round(base.nats, 4),
        "fault": fault(who.engine.host, tuned, base),
    }


def fault(host: str, tuned: Distance, base: Distance | None) -> dict[str, str] | None:
    """What is wrong with the engine, in words; None where it computes the model."""
    if base is not None and base.nats < 0.5 * tuned.nats:
        message = gettext(
            "%(engine)s answers as the base does (%(base)s nats per token away) and not as the model (%(model)s): the adapter is not applied.",
            engine=host,
            base=localized(f"{base.nats:.2g}"),
            model=localized(f"{tuned.nats:.2g}"),
        )
        return {
            "cause": "adapter",
            "message": message,
            "hint": gettext("See whether the server loaded the adapter, and with a rank that is large enough."),
        }
    if not tuned.nats <= FAR:
        message = gettext(
            "%(engine)s gives other next tokens than the model here: %(nats)s nats per token away, where rounding explains %(far)s.",
            engine=host,
            nats=localized(f"{tuned.nats:.2g}"),
            far=localized(f"{FAR:g}"),
        )
        return {"cause": "weights", "message": message, "hint": gettext("See which weights and which quantization the server has loaded.")}
    return None


def distance(theirs: Sequence[Sequence[Logprob]], ours: Sequence[dict[bytes, float]]) -> Distance:
    """A token that is not among the likeliest here counts as the least likely of them. Half characters are left out: an engine may write
    all of them as the same mark."""
    apart, same = [0.0], 0
    for listed, here in zip(theirs, ours, strict=True):
        least = min(here.values())
        apart += [abs(one.logprob - here.get(bytes(one.bytes), least)) for one in listed if "\ufffd" not in one.token]
        first, best = listed[0], max(here, key=here.__getitem__)
        same += bytes(first.bytes) == best or ("\ufffd" in first.token and abs(first.logprob - here[best]) < 0.01)
    return Distance(sum(apart) / max(1, len(apart) - 1), same)


def _request(user: User, who: ResolvedModel, prompt: str) -> GenerateRequest:
    sampling = Sampling(temperature=0, max_tokens=1, seed=0, logprobs=True, top_logprobs=TOP)
    return playground.request_for(user, who, sampling, prompt=prompt)


async def _next_of_engine(request: GenerateRequest) -> list[Logprob]:
    parts = [entry.logprobs for entry in await _all(request) if isinstance(entry, TextPart) and entry.logprobs]
    listed = sorted(parts[0][0].top, key=lambda one: -one.logprob) if parts else []
    if not listed or not request.engine:
        raise Unavailable(
            gettext("The engine gives no log-probabilities, so it cannot be compared."),
            hint=gettext("Switch them on there."),
            code="engine_answer",
        )
    return listed


async def _next_here(request: GenerateRequest, ref: ModelRef) -> dict[bytes, float]:
    asked = request.model_copy(update={"engine": None, "model": ref, "look": HERE})
    seen = next(entry for entry in await _all(asked) if isinstance(entry, PromptLogprobs))
    return {bytes(one.bytes): one.logprob for one in seen.following if one.logprob is not None}


async def _all(request: GenerateRequest) -> list[Entry]:
    async with contextlib.aclosing(client.stream(request)) as answer:  # type: ignore[type-var]
        return [entry async for entries in answer for entry in entries]
