"""Many chats at once, of which half leave in the middle: `python -m benchmarks.leaving --chats 64 --rounds 3`.

A real web process, generate worker, PostgreSQL and Valkey, and the small model of the tests. In each round `--chats` streamed chats begin
at the same moment; every other one closes its connection after its first tokens. Printed per round: whether those that stayed came to
their end, how long they took, how long after the last of them nothing of any chat was left in Valkey, how many answers of those that left
the engine stopped, and how far the memory of both processes grew. At the end the tokens that the studio counted are compared with those
of the stored answers. A first round in which nobody leaves is there to compare with. Exit code 1 where something is left.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import statistics
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import psutil

from benchmarks.servers import Servers, free_port, python, servers, tiny_model

FREE_SECONDS = 30.0
"""The longest that a round may leave something behind."""


PEOPLE = 4
"""The chats are those of so many: one person may have 24 at once."""


class Chat(NamedTuple):
    """How one chat went. Seconds from its request to its first token, and to its end or its leaving."""

    left: bool
    ended: bool
    first_seconds: float
    seconds: float


async def chat(client: httpx.AsyncClient, key: str, number: int, tokens: int, leaves: bool) -> Chat:
    asked = {"role": "user", "content": f"{number}: What is the belly of a violin made of?"}
    body = {"model": "tiny", "messages": [asked], "stream": True, "max_tokens": tokens, "temperature": 1, "seed": number}
    began, first, ended = time.monotonic(), 0.0, False
    async with client.stream("POST", "/v1/chat/completions", json=body, headers={"authorization": f"Bearer {key}"}) as answer:
        if answer.status_code != 200:
            raise RuntimeError(f"{answer.status_code}: {await answer.aread()!r}")
        async for line in answer.aiter_lines():
            if '"content"' in line and not first:
                first = time.monotonic() - began
            ended = ended or line == "data: [DONE]"
            if leaves and first:
                break
    return Chat(leaves and not ended, ended, first, time.monotonic() - began)


async def together(url: str, keys: list[str], count: int, tokens: int, leaving: bool) -> list[Chat]:
    limits = httpx.Limits(max_connections=count)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client:
        return await asyncio.gather(*(chat(client, keys[n // 2 % PEOPLE], n, tokens, leaving and n % 2 == 1) for n in range(count)))


def nothing_left() -> float | None:
    """Seconds until no stream of an answer is in Valkey; None where one stays."""
    from app.queue import PREFIX, get_redis

    began = time.monotonic()
    while time.monotonic() - began < FREE_SECONDS:
        streams = [key for key in get_redis().scan_iter(f"{PREFIX}answer:*", count=1000) if key.count(b":") == PREFIX.count(":") + 1]
        if not streams:
            return time.monotonic() - began
        time.sleep(0.05)
    return None


def counted() -> tuple[int, int, int]:
    """(stored answers, tokens written by them, tokens that count against the limits)."""
    from sqlalchemy import Integer, func, select

    from app.db import transaction
    from app.tables import Answer, TokenUse

    with transaction() as session:
        rows, written = session.execute(select(func.count(), func.sum(Answer.usage["completion_tokens"].astext.cast(Integer)))).one()
        return rows, int(written or 0), int(session.scalar(select(func.sum(TokenUse.written))) or 0)


def measure(options: argparse.Namespace, running: Servers) -> dict[str, Any]:
    from app.db import transaction
    from app.tables import User
    from app.web import auth

    with transaction() as session:
        people = [User(name=f"Person {n}", role="member") for n in range(PEOPLE)]
        session.add_all(people)
        session.flush()
        keys = [auth.create_key(session, person, "chats")[1] for person in people]
        tiny_model(running.folder / "data", session)
    port, logs = free_port(), {name: running.folder / f"{name}.log" for name in ("web", "generate")}
    web = ["-m", "uvicorn", "app.main:create_app", "--factory", "--port", str(port), "--no-access-log", "--log-level", "warning"]
    worker = ["-m", "celery", "-A", "worker.main", "worker", "-Q", "generate", "--pool=threads", "-c", "64", "-l", "INFO"]
    processes = {"web": python(*web, log=logs["web"]), "generate": python(*worker, log=logs["generate"])}
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for(url)
        asyncio.run(together(url, keys, 4, 8, leaving=False))  # loads the model
        every = [one_round(options, url, keys, processes, logs["generate"], leaving) for leaving in [False] + [True] * options.rounds]
        deadline = time.monotonic() + FREE_SECONDS
        asked = 4 + len(every) * options.chats
        while (found := counted())[0] < asked and time.monotonic() < deadline:
            time.sleep(0.2)
    finally:
        for process in processes.values():
            process.terminate()
        for process in processes.values():
            process.wait(30)
    answers, written, limited = found
    return {
        "rounds": every,
        "asked": asked,
        "answers": answers,
        "tokens_written": written,
        "tokens_counted": limited,
        "load_average": psutil.getloadavg()[0],
    }


def one_round(
    options: argparse.Namespace, url: str, keys: list[str], processes: dict[str, Any], log: Path, leaving: bool
) -> dict[str, Any]:
    stopped = lambda: len(re.findall(r"stopped after \d+ of \d+ tokens: nobody reads it", log.read_text(errors="replace")))  # noqa: E731
    before, began = stopped(), time.monotonic()
    chats = asyncio.run(together(url, keys, options.chats, options.tokens, leaving))
    seconds, free = time.monotonic() - began, nothing_left()
    stayed = [one for one in chats if not one.left]
    return {
        "left": sum(one.left for one in chats),
        "stayed": len(stayed),
        "came_to_their_end": sum(one.ended for one in stayed),
        "first_token_p50_seconds": round(statistics.median(one.first_seconds for one in stayed), 3),
        "end_p50_seconds": round(statistics.median(one.seconds for one in stayed), 3),
        "round_seconds": round(seconds, 2),
        "nothing_left_after_seconds": None if free is None else round(free, 2),
        "answers_stopped": stopped() - before,
        "memory_mb": {name: round(resident(process.pid) / 2**20, 1) for name, process in processes.items()},
    }


def resident(pid: int) -> int:
    top = psutil.Process(pid)
    return sum(process.memory_info().rss for process in (top, *top.children(recursive=True)))


def wait_for(url: str) -> None:
    for _ in range(600):
        try:
            httpx.get(f"{url}/healthz").raise_for_status()
            return
        except httpx.HTTPError:
            time.sleep(0.1)
    raise SystemExit("The web process did not answer.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chats", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=200, help="most tokens of each answer")
    parser.add_argument("--rounds", type=int, default=3, help="rounds in which half leave, after one in which nobody does")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with servers() as running:
        result = measure(options, running)
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.write_text(json.dumps(result))
    whole = all(one["came_to_their_end"] == one["stayed"] and one["nothing_left_after_seconds"] is not None for one in result["rounds"])
    sys.exit(0 if whole and result["answers"] == result["asked"] and result["tokens_counted"] == result["tokens_written"] else 1)


if __name__ == "__main__":
    main()
