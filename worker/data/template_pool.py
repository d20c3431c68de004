"""Pool of sandboxed processes that render chat templates (`worker/data/template_child.py`).

A template is code written by the model's author. One that never ends, or takes all memory, costs the conversation it was given
and a process of 20 MB; nobody else waits for it. Every template has processes of its own, which are kept for the next
conversation: rendering there takes no more than one line through a pipe.

    one conversation        `write`: an answer within SECONDS, or an error
    the rows of a dataset   `write_many`: many conversations in one line
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from app.errors import BadData, BadTemplate, Unavailable

SECONDS, CPU_SECONDS = 2.0, 1.0
"""Limits of one conversation: wall-clock seconds, including the wait for a process, and CPU seconds."""
PATIENT_SECONDS = 60.0
"""The wall-clock limit where nobody waits interactively, as in a job; the CPU limit is the same."""
START_SECONDS = 60.0
"""Limit for starting a process; exceeding it is not the template's fault."""
LOOK_SECONDS, HOT_SECONDS = 0.1, 0.05
"""Polling interval of a process that has not answered. One that used HOT_SECONDS of CPU within it continues at the lowest
priority, because others generate on the same cores; one that used less is slowed by the machine."""
MAX_BUSY, MAX_BUSY_OF_ONE, MAX_IDLE = 8, 2, 4
"""Maximum numbers of processes that render, that render one template, and that are idle."""
MAX_BUSY_OF_STOPPED, STOPPED_SECONDS = 2, 60.0
"""Templates that had to be stopped in the last STOPPED_SECONDS share this many processes, however many they are."""
TROUBLE_SECONDS = 10.0
"""Time to find the rows that a template cannot render, in a batch that it did not finish."""
MEMORY_BYTES = 512 << 20
"""Memory limit of one process, of which Python and Jinja take 20 MB."""
MAX_TEMPLATE, MAX_WRITTEN = 1 << 20, 8 << 20
"""Maximum characters of a template, and of a rendered conversation."""


class TemplateInput(NamedTuple):
    """Messages in the shape templates expect. With `generate` the generation prompt follows, and earlier answers need not be located.
    `options` are further variables, as `enable_thinking`."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None = None
    generate: bool = False
    options: dict[str, bool | str] = {}  # noqa: RUF012


class Span(NamedTuple):
    """A range of a text, in characters."""

    start: int
    end: int


class RenderedConversation(NamedTuple):
    """A rendered conversation, and the spans of its answers by the number of their message."""

    text: str
    answers: dict[int, Span]


class TemplateFailed(BadData):
    """The template raises an error for this conversation."""


class TooLong(BadData):
    """The text has more than the allowed number of `characters`."""

    def __init__(self, characters: int) -> None:
        super().__init__(f"The conversation has {characters:,} characters as the model's chat template writes it.", hint="Shorten it.")
        self.characters = characters


def write(tokenizer: Any, template: str, chat: TemplateInput, most: int = MAX_WRITTEN, seconds: float = SECONDS) -> RenderedConversation:
    """Render one conversation. Raises Refused, TooLong, BadTemplate, or Unavailable when no process is free for all of these `seconds`."""
    return _read(_pool().ask(_kind(tokenizer, template), [chat], most, seconds, CPU_SECONDS)[0], most)


def write_many(tokenizer: Any, template: str, chats: Sequence[TemplateInput]) -> list[RenderedConversation | BadData]:
    """Render each conversation; a BadData in place of one that fails. Where the template does not finish, they are rendered one
    by one, and when that has taken TROUBLE_SECONDS in all, the rest are refused."""
    pool, kind = _pool(), _kind(tokenizer, template)

    def ask(some: Sequence[TemplateInput]) -> list[RenderedConversation | BadData]:
        answers = pool.ask(kind, some, MAX_WRITTEN, PATIENT_SECONDS, CPU_SECONDS + 0.002 * len(some))
        return [_read_or_error(answer) for answer in answers]

    if len(chats) > 1 and pool.trouble[kind] <= TROUBLE_SECONDS:
        with contextlib.suppress(BadTemplate):
            return ask(chats)
    found: list[RenderedConversation | BadData] = []
    for chat in chats:
        began = time.monotonic()
        try:
            if pool.trouble[kind] > TROUBLE_SECONDS:
                raise BadTemplate("The model's chat template had to be stopped too often for other rows before this one.", hint=_MEND)
            found += ask([chat])
        except BadTemplate as error:
            found.append(error)
        if len(chats) > 1 or isinstance(found[-1], BadTemplate):
            pool.trouble[kind] += time.monotonic() - began
    return found


def _read_or_error(answer: Any) -> RenderedConversation | BadData:
    try:
        return _read(answer, MAX_WRITTEN)
    except BadData as error:
        return error


def _read(answer: Any, most: int) -> RenderedConversation:
    """Validate an answer: a template may have taken over the process, so nothing in it is trusted."""
    match answer:
        case {"text": str(text), "spans": list(spans)} if len(text) <= most:
            with contextlib.suppress(TypeError, ValueError):
                found = {int(i): Span(int(start), int(end)) for i, start, end in spans}
                if all(0 <= span.start <= span.end <= len(text) for span in found.values()):
                    return RenderedConversation(text, found)
        case {"long": int(size)}:
            raise TooLong(size)
        case {"refused": str(why)}:
            raise TemplateFailed(
                f"The model's chat template refuses this conversation: {why[:500]}",
                hint="Check the order of the roles; some models take no system message.",
            )
        case {"rewritten": int(turn)}:
            raise BadData(
                f"The model's chat template rewrites turn {turn + 1} of this conversation, so the answer to train on cannot be found in it.",
                hint="Split the conversation so that this answer comes last, or use another model.",
            )
    raise _stopped("crashed")


_MEND = "Fix the template of the model, or use another model."


def _stopped(why: str) -> BadTemplate:
    said = {
        "time": f"takes more than {CPU_SECONDS:g} second of work",
        "memory": f"needs more than {MEMORY_BYTES >> 20} MiB of memory",
    }.get(why, "ends the process it runs in")
    return BadTemplate(f"The model's chat template {said} for this conversation, so it was stopped.", hint=_MEND)


def _busy(message: str) -> Unavailable:
    return Unavailable(message, hint="Try again in a moment.", code="busy")


# What a process is started for ----------------------------------------------------------------------------------------


class _Kind(NamedTuple):
    """A template with a tokenizer's special tokens: what one process renders, and no other."""

    template: str
    variables: tuple[tuple[str, str], ...]
    endings: str  # a hash of them: some tokenizers have thousands


def _kind(tokenizer: Any, template: str) -> _Kind:
    if len(template) > MAX_TEMPLATE:
        raise BadTemplate(f"The model's chat template has {len(template):,} characters, more than {MAX_TEMPLATE:,}.", hint=_MEND)
    size, key = _known.get(tokenizer, (-1, ""))
    if size != len(tokenizer):
        texts = sorted({str(t) for t in tokenizer.added_tokens_decoder.values()} | set(tokenizer.all_special_tokens) - {""})
        size, key = _known[tokenizer] = (len(tokenizer), hashlib.sha256("\0".join(texts).encode("utf-8", "replace")).hexdigest())
        _endings[key] = texts
    return _Kind(template, tuple(sorted(tokenizer.special_tokens_map.items())), key)


_known: WeakKeyDictionary[Any, tuple[int, str]] = WeakKeyDictionary()
_endings: dict[str, list[str]] = {}


# Processes ------------------------------------------------------------------------------------------------------------


class _Died(Exception):
    """The process ended, or was killed, before it answered: out of time, out of memory, crashed, or busy."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why


class _Child:
    """A process for one kind of conversation. Used by one thread at a time, and by none once it has died."""

    def __init__(self, kind: _Kind) -> None:
        self.kind, self.hot = kind, False
        kept = {name: os.environ[name] for name in ("LUTHIER_STUDIO", "TZ", "LD_LIBRARY_PATH") if name in os.environ}
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-X", "utf8", str(Path(__file__).with_name("template_child.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=kept,
            cwd="/",
            bufsize=0,
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self._in, self._out = self.process.stdin.fileno(), self.process.stdout.fileno()
        os.set_blocking(self._in, False)
        os.set_blocking(self._out, False)
        setting = {
            "memory_bytes": MEMORY_BYTES, "template": kind.template, "variables": dict(kind.variables), "endings": _endings[kind.endings],
        }  # fmt: skip
        try:
            self._exchange(json.dumps(setting).encode() + b"\n", time.monotonic() + START_SECONDS)
        except _Died as error:
            raise Unavailable(
                f"The process that renders chat templates did not start ({error.why}).", hint="Try again in a moment."
            ) from None

    def ask(self, line: bytes, deadline: float) -> list[Any]:
        """The answer to a line. Raises _Died."""
        said = self._exchange(line, deadline, polite=True)
        answer = None
        with contextlib.suppress(ValueError, RecursionError):
            answer = json.loads(said)
        if isinstance(answer, list):
            return answer
        self.end()
        raise _Died("memory" if answer == {"stopped": "memory"} else "crashed")

    def _exchange(self, line: bytes, deadline: float, *, polite: bool = False) -> bytes:
        """Write a line and read one. A `polite` process that takes long runs at the lowest priority from then on."""
        left, answer, size = memoryview(line), list[bytes](), 0
        looked, at_first = time.monotonic(), None
        poll = select.poll()
        poll.register(self._out, select.POLLIN)
        poll.register(self._in, select.POLLOUT)
        while True:
            now = time.monotonic()
            if now - looked > LOOK_SECONDS and polite and not self.hot:
                looked, used = now, self._used_seconds()
                at_first = used if at_first is None else at_first
                if used - at_first >= HOT_SECONDS:
                    self.hot = True
                    with contextlib.suppress(OSError):
                        os.setpriority(os.PRIO_PROCESS, self.process.pid, 19)
            if now > deadline or size > 16 * MAX_WRITTEN:
                self.end()
                raise _Died("crashed" if now <= deadline else "time" if self.hot or not polite else "busy")
            patience = deadline - now if self.hot or not polite else LOOK_SECONDS
            for handle, _ in poll.poll(1000 * patience + 1):
                try:
                    if handle == self._in:
                        left = left[os.write(self._in, left) :]
                        if not left:
                            poll.unregister(self._in)
                        continue
                    chunk = os.read(self._out, 1 << 20)
                except BlockingIOError:
                    continue
                except BrokenPipeError:
                    chunk = b""
                answer.append(chunk)
                size += len(chunk)
                if not chunk or (left and chunk.endswith(b"\n")):
                    raise _Died(self.end())
                if chunk.endswith(b"\n"):
                    return b"".join(answer)

    def _used_seconds(self) -> float:
        """CPU seconds since it was started."""
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
            return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        return 0.0

    def end(self) -> str:
        """Kill it, and return what it had died of before."""
        self.process.stdin.close()  # type: ignore[union-attr]  # which ends one that waits
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(0.1)
        self.process.kill()
        self.process.stdout.close()  # type: ignore[union-attr]
        return "time" if self.process.wait() == -signal.SIGPROF else "crashed"


class _Pool:
    """The children of this process, by kind. Thread-safe."""

    def __init__(self) -> None:
        self.trouble: defaultdict[_Kind, float] = defaultdict(float)
        self._free = threading.Condition()
        self._idle: list[_Child] = []  # least recently used first
        self._busy: Counter[_Kind] = Counter()
        self._stopped: dict[_Kind, float] = {}

    def ask(self, kind: _Kind, chats: Sequence[TemplateInput], most: int, seconds: float, cpu_seconds: float) -> list[Any]:
        """One answer for each conversation. Raises BadTemplate or Unavailable."""
        line = f"{cpu_seconds} {json.dumps([chat._asdict() | {'most': most} for chat in chats])}\n".encode()
        deadline = time.monotonic() + seconds
        self._enter(kind, deadline)
        child = None
        try:
            began = time.monotonic()
            child = self._take(kind) or _Child(kind)
            now = time.monotonic()
            answers = child.ask(line, max(deadline + now - began, now + seconds / 4))
            if len(answers) != len(chats):
                raise _Died(child.end())
        except BaseException as error:
            if child is not None and child.process.returncode is None:
                child.end()
            if not isinstance(error, _Died):
                raise
            if error.why == "busy":
                raise _busy("The machine is too busy to render a conversation.") from None
            self._stopped[kind] = time.monotonic()
            raise _stopped(error.why) from None
        else:
            self._put_back(child)
            return answers
        finally:
            self._leave(kind)

    def _enter(self, kind: _Kind, deadline: float) -> None:
        with self._free:
            if not self._free.wait_for(lambda: self._may_begin(kind), deadline - time.monotonic()):
                raise _busy("Too many conversations are being rendered.")
            self._busy[kind] += 1

    def _may_begin(self, kind: _Kind) -> bool:
        now = time.monotonic()
        bad = {one for one, at in self._stopped.items() if now - at < STOPPED_SECONDS}
        if kind in bad and sum(self._busy[one] for one in bad) >= MAX_BUSY_OF_STOPPED:
            return False
        return self._busy[kind] < MAX_BUSY_OF_ONE and self._busy.total() < MAX_BUSY

    def _leave(self, kind: _Kind) -> None:
        with self._free:
            self._busy[kind] -= 1
            if not self._busy[kind]:
                del self._busy[kind]
            self._free.notify_all()

    def _take(self, kind: _Kind) -> _Child | None:
        """The most recently used idle process of this kind, if it is still alive."""
        while True:
            with self._free:
                child = next((one for one in reversed(self._idle) if one.kind == kind), None)
                if child is None:
                    return None
                self._idle.remove(child)
            if child.process.poll() is None:
                return child
            child.end()

    def _put_back(self, child: _Child) -> None:
        with self._free:
            self._idle.append(child)
            spare = [one for one in self._idle if one.hot]
            spare += [one for one in self._idle if not one.hot][: max(0, len(self._idle) - len(spare) - MAX_IDLE)]
            self._idle = [one for one in self._idle if one not in spare]
        for one in spare:
            one.end()


@functools.cache
def _pool_of(process: int) -> _Pool:
    return _Pool()


def _pool() -> _Pool:
    """The pool of this process. A fork gets its own: two processes reading one pipe would take each other's answers."""
    return _pool_of(os.getpid())
