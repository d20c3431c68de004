"""Readers of answers who leave in the middle of a command (S18): the reply that they did not wait for never becomes another reader's.

After CVE-2023-28858, in which a cancelled command of redis-py left its reply in the connection. Real Valkey, the client of the web process,
and answers written as the generate worker writes them."""

from __future__ import annotations

import asyncio
import random
import threading
import uuid
from contextlib import aclosing

import pytest

from app.inference import client
from app.inference.protocol import Done, GenerateRequest, Sampling, TextPart
from app.models import service as models
from app.queue import get_redis
from worker.inference.task import Publisher

PARTS = 4
DONE = Done(prompt_tokens=1, completion_tokens=PARTS, first_token_seconds=None, tokens_per_second=None)


async def read(request: GenerateRequest) -> list[str]:
    """The texts of one answer; each must name the request that they were written for."""
    heard = []
    async with aclosing(client.stream(request)) as answer:
        async for entries in answer:
            for entry in entries:
                if isinstance(entry, TextPart):
                    assert entry.text == request.id.hex, "a reader got the answer of another one"
                    heard.append(entry.text)
    return heard


def write(requests: list[GenerateRequest], draw: random.Random, left: threading.Event) -> None:
    """All answers, a part at a time and in an order that is drawn, as several workers would; none ends before all have left that leave."""
    writers = [Publisher(get_redis(), one.id) for one in requests]
    for _ in range(PARTS):
        draw.shuffle(writers)
        for one in writers:
            one.say([TextPart(index=0, text=one.id.hex, tokens=1)])
    left.wait()
    for one in writers:
        one.say([DONE])


@pytest.mark.long
@pytest.mark.parametrize(("seed", "readers"), [(1, 100), pytest.param(2, 1000, marks=[pytest.mark.fault, pytest.mark.timeout(600)])])
def test_a_reader_who_leaves_in_the_middle_of_a_command_leaves_no_reply_to_others(session, tiny_registered, monkeypatch, seed, readers):
    draw, model = random.Random(seed), models.reference(session, tiny_registered)
    requests = [
        GenerateRequest(id=uuid.uuid4(), owner=uuid.uuid4(), model=model, prompt="a", sampling=Sampling(), seed=1) for _ in range(readers)
    ]
    leaving = set(draw.sample(range(readers), readers // 2))

    async def sent(request: GenerateRequest) -> None:
        """Nobody need be told: the answers are written here."""

    monkeypatch.setattr(client, "_send", sent)

    async def all_of_them() -> list[list[str] | BaseException]:
        left = threading.Event()
        tasks = [asyncio.create_task(read(one)) for one in requests]
        writing = asyncio.create_task(asyncio.to_thread(write, requests, draw, left))
        for place in draw.sample(sorted(leaving), len(leaving)):
            await asyncio.sleep(draw.choice((0.0, 0.0005, 0.002)))
            tasks[place].cancel()
        left.set()
        await writing
        return await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 60)

    found = asyncio.run(all_of_them())
    assert sum(isinstance(one, asyncio.CancelledError) for one in found) >= readers // 4, "nobody left in the middle"
    for place, one in enumerate(found):
        if place in leaving:
            assert isinstance(one, list | asyncio.CancelledError), one
        else:
            assert one == [requests[place].id.hex] * PARTS
