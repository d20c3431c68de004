"""The run itself: every route in its turn, and what must hold of every answer."""

from __future__ import annotations

import dataclasses
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from markupsafe import escape

from app.errors import StudioError
from app.web import error_responses
from app.web.navigation import each_route
from tests.fuzz.asgi import Answer, Headers, Raw, ask
from tests.fuzz.mutate import Mutator, Parts, raw
from tests.fuzz.samples import KEYS, NAMES, SAFE, UNSAFE, Sample
from tests.fuzz.world import World

MAX_SECONDS = 5.0
"""The longest that any request may take."""
UNAVAILABLE = {"offline"}
"""Codes of the 503 that are meant: the tests' studio is set to stay offline."""
HOST: Headers = [(b"host", b"127.0.0.1:8000")]


@dataclasses.dataclass
class Case:
    """A route with its valid request. `seconds` is what it has cost so far: the cheapest is always next."""

    name: str
    sample: Sample
    path: str
    known_query: tuple[str, ...]
    seconds: float = 0.0
    sharp: list[Callable[[Parts], Parts]] | None = None
    """Changes that are still to be made before chance has its turn."""


def cases(app: Any) -> list[Case]:
    """One for each route and method. Raises LookupError for an unsafe route that has no sample."""
    found = []
    for path, route in each_route(app.router):
        query = tuple(_query_names(getattr(route, "dependant", None)))
        for method in sorted(getattr(route, "methods", None) or {"GET"}):
            name = f"{method} {path}"
            if method in ("POST", "PUT", "PATCH", "DELETE"):
                if name not in UNSAFE:
                    raise LookupError(f"{name} has no sample in tests/fuzz/samples.py")
                found.append(Case(name, UNSAFE[name], path, query))
            elif method != "HEAD" or "/tus/" in path:
                found.append(Case(name, SAFE.get(name) or _from_signature(path), path, query))
    return found


def _query_names(dependant: Any) -> Iterator[str]:
    if dependant is not None:
        yield from (one.alias for one in dependant.query_params)
        for inner in dependant.dependencies:
            yield from _query_names(inner)


def _from_signature(path: str) -> Sample:
    params = {name: NAMES[name] for name in NAMES if f"{{{name}}}" in path}
    if "{key}" in path:
        params["key"] = next(value for start, value in KEYS if path.startswith(start))
    return Sample(params)


class Fuzz:
    """Puts requests to an app and keeps what was wrong in `problems`."""

    def __init__(self, app: Any, world: World, api: Headers, page: Headers, seed: int) -> None:
        self.app, self.world, self.seed = app, world, seed
        self.doors = {True: [*HOST, *api], False: [*HOST, *page, (b"accept", b"text/html")]}
        self.cases = cases(app)
        self.mutator = Mutator(seed)
        self.statuses: Counter[int] = Counter()
        self.meant = 0
        """Answers of 503 because the tests' studio is set to stay offline."""
        self.problems: list[str] = []
        self.kinds: Counter[str] = Counter()
        self.slowest = (0.0, "")
        self.faults: list[StudioError] = []

    def parts(self, case: Case) -> Parts:
        sample, fill = case.sample, self._fill
        return Parts(
            case.name.split(" ")[0], case.path, fill(sample.params), [tuple(pair) for pair in fill(sample.query)], fill(sample.json),
            None if sample.form is None else [tuple(pair) for pair in fill(sample.form)], sample.multipart, sample.body, list(sample.headers), case.known_query,
        )  # fmt: skip

    def _fill(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._name(value)
        if isinstance(value, dict):
            return {self._fill(key): self._fill(item) for key, item in value.items()}
        return [self._fill(item) for item in value] if isinstance(value, list | tuple) else value

    def _name(self, text: str) -> str:
        if text.startswith("+"):
            return self.world.fresh(text[1:])
        head, sign, tail = text.partition("$")
        if not sign:
            return text
        name = max((known for known in self.world.ids if tail.startswith(known)), key=len)
        return head + self.world.ids[name] + tail[len(name) :]

    def door(self, case: Case) -> Headers:
        if case.path in (
            "/sign-out",
            "/settings/account/sign-out-everywhere",
        ):  # the session of the pages must not end, and no key may do this
            return self.doors[True]
        return self.doors[case.path.startswith("/v1")]

    async def _put(self, request: Raw) -> Answer:
        self.faults.clear()
        answer = await ask(self.app, request)
        self.statuses[answer.status] += 1
        return answer

    async def valid(self) -> list[str]:
        """Each sample as it stands: what is not honored would be fuzzed in vain."""
        wrong = []
        for case in self.cases:
            parts = self.parts(case)
            answer = await self._put(raw(parts, self.door(case)))
            if answer.status not in case.sample.expect:
                wrong.append(f"{case.name} answers {answer.status}: {answer.error!r} {answer.text[:400]}")
        return wrong

    async def run(self, seconds: float) -> int:
        """Changed requests for so long. Returns how many there were."""
        deadline, count = time.monotonic() + seconds, 0
        while time.monotonic() < deadline:
            case = min(self.cases, key=lambda one: one.seconds)
            began = time.monotonic()
            parts = self.parts(case)
            if case.sharp is None:
                case.sharp = self.mutator.sharp(parts)
            request = raw(case.sharp.pop()(parts) if case.sharp else self.mutator.mutate(parts), self.door(case))
            answer = await self._put(request)
            if answer.seconds > MAX_SECONDS:  # others may have had the machine: only what is slow again is slow
                answer = await self._put(request)
            self._judge(case, request, answer)
            case.seconds += time.monotonic() - began
            count += 1
            if count % 300 == 0:
                self.world.prune_keys()
        return count

    def _judge(self, case: Case, request: Raw, answer: Answer) -> None:
        self.slowest = max(self.slowest, (answer.seconds, f"{request}"))
        for what in self._wrong(case, answer):
            kind = f"{case.name}: {what}".encode("utf-8", "backslashreplace").decode()
            self.kinds[kind] += 1
            if self.kinds[kind] <= 2:
                self.problems.append(
                    f"{kind}\n    {request}\n    {answer.status} {answer.error!r} {answer.text[:300]!r}".encode(
                        "utf-8", "backslashreplace"
                    ).decode()
                )

    def _wrong(self, case: Case, answer: Answer) -> Iterator[str]:
        if answer.error is not None:
            yield f"raised {type(answer.error).__name__}"
            return
        if answer.seconds > MAX_SECONDS:
            yield f"took more than {MAX_SECONDS:.0f} s"
        if answer.status < 400:
            return
        if answer.status >= 500 and case.path != "/readyz":
            code = self.faults[-1].code if self.faults else None
            shown = "The studio is set to stay offline" in answer.text  # on a page that shows the error itself
            if answer.status == 503 and (code in UNAVAILABLE or shown):
                self.meant += 1
            else:
                yield f"{answer.status} {code}"
        kind = answer.headers.get("content-type", "")
        if case.name.startswith("HEAD") or not answer.body:
            return
        if kind.startswith("application/json"):
            yield from json_shape(answer)
        elif kind.startswith("text/html"):
            if case.path.startswith("/v1"):
                yield "a page for a program"
            said = any(str(escape(fault.message)) in answer.text for fault in self.faults)  # others may be of work in the background
            if not said and 'role="alert"' not in answer.text and 'class="fault"' not in answer.text:  # the last is at its field
                yield "a page that names no error"
        elif not kind.startswith("text/event-stream"):
            yield f"an error as {kind or 'nothing'}"
        for fault in self.faults:
            if not fault.message or not fault.hint:
                yield f"no hint: {fault.message[:60]}"


def json_shape(answer: Answer) -> Iterator[str]:
    try:
        error = json.loads(answer.body)["error"]
    except (ValueError, KeyError, TypeError):
        yield f"{answer.status} without an error object"
        return
    texts = [error.get("message"), error.get("type"), error.get("code")]
    if set(error) != {"message", "type", "param", "code"} or not all(isinstance(text, str) and text for text in texts):
        yield f"{answer.status} with another error object"


def spy(fuzz: Fuzz, monkeypatch: Any) -> None:
    """Every fault that becomes an answer is kept for a look: the API joins message and hint to one text."""
    real = error_responses.answer

    def answer(request: Any, fault: StudioError) -> Any:
        fuzz.faults.append(fault)
        return real(request, fault)

    monkeypatch.setattr(error_responses, "answer", answer)
