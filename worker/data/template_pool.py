"""Conversations written by chat templates, in processes of their own (`worker/data/template_child.py`) that end with what they do wrong.

A template belongs to whoever made the model. One that never ends, or that asks for all memory, costs the conversation it was given
and a process of 20 MB; nobody else's answer waits for it. Every template has processes of its own, which are kept for the next
conversation: one more line through a pipe is all that rendering there takes.

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
"""What one conversation may take: seconds until there is an answer, waiting for a process included, and seconds of a processor."""
PATIENT_SECONDS = 60.0
"""The seconds where nobody sits and waits, as in a job; a processor's are as few as ever."""
START_SECONDS = 60.0
"""A process that has not begun by then is no template's fault."""
LOOK_SECONDS, HOT_SECONDS = 0.1, 0.05
"""A process without an answer is looked at so often. One that has used so much of a processor between two looks goes on at the
lowest priority, since others' answers are written on the same cores; where it has not, the machine is what is slow."""
MAX_BUSY, MAX_BUSY_OF_ONE, MAX_IDLE = 8, 2, 4
"""Processes that render at once, those of one template, and those that wait for the next conversation."""
MAX_BUSY_OF_STOPPED, STOPPED_SECONDS = 2, 60.0
"""Templates that had to be stopped in the last minute have so many processes together, however many they are."""
TROUBLE_SECONDS = 10.0
"""Time to find the rows that a template cannot write, of a batch that it did not come to the end of. After that it is given up."""
MEMORY_BYTES = 512 << 20
"""Memory of one process, of which Python and Jinja take 20 MB."""
MAX_TEMPLATE, MAX_WRITTEN = 1 << 20, 8 << 20
"""Characters of a template, and of a conversation as it writes it."""


class Chat(NamedTuple):
    """Messages as templates know them. With `generate` the generation prompt follows, and answers before it need not be found."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None = None
    generate: bool = False


class Span(NamedTuple):
    """A stretch of a text, in characters."""

    start: int
    end: int


class Written(NamedTuple):
    """The text of a conversation, and by the number of its message where each answer stands in it."""

    text: str
    answers: dict[int, Span]


class Refused(BadData):
    """The template raises an error for this conversation."""


class TooLong(BadData):
    """The text has more characters than were allowed: `characters`."""

    def __init__(self, characters: int) -> None:
        super().__init__(f"The conversation has {characters:,} characters as the model's chat template writes it.", hint="Shorten it.")
        self.characters = characters


def write(tokenizer: Any, template: str, chat: Chat, most: int = MAX_WRITTEN, seconds: float = SECONDS) -> Written:
    """One conversation. Raises Refused, TooLong, BadTemplate, or Unavailable when others are at it for all of these `seconds`."""
    return _read(_pool().ask(_kind(tokenizer, template), [chat], most, seconds, CPU_SECONDS)[0], most)


def write_many(tokenizer: Any, template: str, chats: Sequence[Chat]) -> list[Written | BadData]:
    """Each conversation, or what is wrong with it. Where the template does not come to an end they are gone through one by one,
    and when that has taken TROUBLE_SECONDS in all, the others are refused."""
    pool, kind = _pool(), _kind(tokenizer, template)

    def ask(some: Sequence[Chat]) -> list[Written | BadData]:
        answers = pool.ask(kind, some, MAX_WRITTEN, PATIENT_SECONDS, CPU_SECONDS + 0.002 * len(some))
        return [_read_or_error(answer) for answer in answers]

    if len(chats) > 1 and pool.trouble[kind] <= TROUBLE_SECONDS:
        with contextlib.suppress(BadTemplate):
            return ask(chats)
    found: list[Written | BadData] = []
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


def _read_or_error(answer: Any) -> Written | BadData:
    try:
        return _read(answer, MAX_WRITTEN)
    except BadData as error:
        return error


def _read(answer: Any, most: int) -> Written:
    """The answer of a process that a template may have taken over, so that nothing in it is taken for granted."""
    match answer:
        case {"text": str(text), "spans": list(spans)} if len(text) <= most:
            with contextlib.suppress(TypeError, ValueError):
                found = {int(i): Span(int(start), int(end)) for i, start, end in spans}
                if all(0 <= span.start <= span.end <= len(text) for span in found.values()):
                    return Written(text, found)
        case {"long": int(size)}:
            raise TooLong(size)
        case {"refused": str(why)}:
            raise Refused(
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
    """A template with the special tokens of a tokenizer: what one process renders, and no other."""

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
    """The process ended, or was ended, before it had answered: of time, of memory, crashed, or busy."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why


class _Child:
    """A process for one kind of conversation. One thread at a time asks it, and none any more once it has died."""

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
        """Write a line and read one. Where it takes long a `polite` process gives way to all others from then on."""
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
        """Seconds of a processor since it was started."""
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
            return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        return 0.0

    def end(self) -> str:
        """End it, and say what it had died of before."""
        self.process.stdin.close()  # type: ignore[union-attr]  # which ends one that waits
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(0.1)
        self.process.kill()
        self.process.stdout.close()  # type: ignore[union-attr]
        return "time" if self.process.wait() == -signal.SIGPROF else "crashed"


class _Pool:
    """The processes of this process, by kind. Any number of threads may ask."""

    def __init__(self) -> None:
        self.trouble: defaultdict[_Kind, float] = defaultdict(float)
        self._free = threading.Condition()
        self._idle: list[_Child] = []  # the longest unused first
        self._busy: Counter[_Kind] = Counter()
        self._stopped: dict[_Kind, float] = {}

    def ask(self, kind: _Kind, chats: Sequence[Chat], most: int, seconds: float, cpu_seconds: float) -> list[Any]:
        """What a process answers to these conversations, one entry for each. Raises BadTemplate or Unavailable."""
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
        """The process of this kind that was used last, if it still lives."""
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
    """The pool of this process. A fork has its own: two that read one pipe would take each other's answers."""
    return _pool_of(os.getpid())
