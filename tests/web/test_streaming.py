"""Several answers as one stream, and what stops when nobody hears it any more."""

from __future__ import annotations

import asyncio
import contextlib

from app.inference.protocol import TextPart
from app.web import streaming


def test_a_stream_that_loses_a_cancellation_is_stopped_all_the_same():
    """As `asyncio.wait_for` of Python 3.11 loses one that comes when what it waits for is done."""
    lost, closed = [], asyncio.Event()

    async def speak():
        try:
            while True:
                try:
                    await asyncio.sleep(0.001)
                except asyncio.CancelledError:
                    if lost:
                        raise
                    lost.append(True)
                yield [TextPart(index=0, text="a", tokens=1)]
        finally:
            closed.set()

    async def hear():
        async with contextlib.aclosing(streaming.merge([speak()])) as merged:
            assert await anext(merged) == (0, [TextPart(index=0, text="a", tokens=1)])
        await asyncio.wait_for(closed.wait(), 5)
        others = {task for task in asyncio.all_tasks() if task is not asyncio.current_task()}
        assert not others or not (await asyncio.wait(others, timeout=5))[1]

    asyncio.run(hear())
    assert lost
