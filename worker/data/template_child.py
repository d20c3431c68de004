"""The sandboxed process in which chat templates are rendered, started by `worker/data/template_pool.py`: limits first, then one
line in, one line out.

A template is a program written by the model's author. Here it may use the memory it is given, the CPU seconds that each line
names, and no file, socket or process at all; if it exceeds that, this process ends and nothing else does. It renders as
transformers' `apply_chat_template` does, without importing transformers: a test compares the two.

    in     {"memory_bytes", "template", "variables", "endings"}, once
    out    "ready"
    in     SECONDS [{"messages", "tools", "generate", "options", "most"}, …]
    out    [{"text", "spans"} | {"refused"} | {"rewritten"} | {"long"}, …], or {"stopped"} and the end
"""

from __future__ import annotations

import contextlib
import json
import resource
import signal
import sys
from datetime import datetime
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

_ALIASES = ("reasoning_content", "thinking", "reasoning")


class TurnNotFound(Exception):
    """Turn `turn` cannot be located in the text, because the template rewrites it."""

    def __init__(self, turn: int) -> None:
        super().__init__(turn)
        self.turn = turn


class TemplateWriter:
    """One template with the tokenizer's special tokens by name, and all tokens that may end a turn (`endings`)."""

    def __init__(self, template: str, variables: dict[str, str], endings: list[str]) -> None:
        self.source, self.variables, self.endings = template, variables, endings
        self.options: dict[str, Any] = {}
        self._compiled: Any = None

    def chat(
        self, messages: list[dict[str, Any]], tools: list[Any] | None, generate: bool, most: int, options: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """The text of a conversation, rendered with `options` as further variables, and the character spans of its answers: [turn,
        start, end].

        With `generate` it is a prompt, whose earlier answers need not be located. A text of more than `most` characters is not
        returned.
        """
        self.options = options or {}
        try:
            text = self.text(messages, tools, generate)
            if len(text) > most:
                return {"long": len(text)}
            turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
            return {"text": text, "spans": [[i, *self._answer(messages, tools, text, i)] for i in turns]}
        except TurnNotFound as missing:
            return {"text": text, "spans": []} if generate else {"rewritten": missing.turn}
        except MemoryError:
            raise
        except RecursionError:
            return {"refused": "it calls itself or is nested too deeply."}
        except Exception as error:
            return {"refused": str(error)[:500] or type(error).__name__}

    def text(self, messages: list[dict[str, Any]], tools: list[Any] | None, generate: bool = False) -> str:
        """The rendered text. Exceptions of the template are passed on."""
        if not messages:
            raise ValueError("There is no message.")
        if self._compiled is None:
            self._compiled = compile_template(self.source)
        return self._compiled.render(
            **self.options,
            messages=[_as_known(m) for m in messages],
            tools=tools,
            documents=None,
            add_generation_prompt=generate,
            **self.variables,
        )

    def _try(self, messages: list[dict[str, Any]], tools: list[Any] | None, generate: bool = False) -> str | None:
        try:
            return self.text(messages, tools, generate)
        except MemoryError:
            raise
        except Exception:
            return None

    def _answer(self, messages: list[dict[str, Any]], tools: list[Any] | None, text: str, i: int) -> tuple[int, int]:
        """The span of the assistant's turn `i` in the rendered `text`.

        First by prefixes: what the template adds to `messages[:i]` and its generation prompt when it is given the turn. A
        template that renders earlier turns differently (dropping old reasoning, for example) fails that test; then a marker in
        place of the turn's content shows where the content is. If neither works, the turn cannot be located.
        """
        before = self._try(messages[:i], tools, generate=True)
        through = text if i == len(messages) - 1 else self._try(messages[: i + 1], tools)
        if before is not None and not text.startswith(before):
            before = None
        if before is not None and through is not None and text.startswith(through) and len(through) > len(before):
            return len(before), self._close(text, len(before), len(through))
        content = messages[i].get("content") or ""
        found = self._by_marker(messages, tools, text, i) if content.strip() else None
        if found is None:
            raise TurnNotFound(i)
        start = len(before) if before is not None and len(before) <= found[0] else found[0]
        return start, self._turn_end(text, found[1])

    def _by_marker(self, messages: list[dict[str, Any]], tools: list[Any] | None, text: str, i: int) -> tuple[int, int] | None:
        """The span of a turn's content: what is between the unchanged text before and after a marker in its place."""
        marker = "\ue000luthier\ue001"
        marked = self._try([*messages[:i], {**messages[i], "content": marker}, *messages[i + 1 :]], tools)
        if marked is None or marked.count(marker) != 1:
            return None
        head, tail = marked.split(marker)
        end = len(text) - len(tail)
        if not (text.startswith(head) and text.endswith(tail) and len(head) < end):
            return None
        inside = text[len(head) : end].strip()
        return (len(head), end) if inside and inside in messages[i]["content"] else None

    def _close(self, text: str, start: int, end: int) -> int:
        """`end` without whitespace that a template writes after the end-of-turn token: the model stops at the token, so it never
        generates that."""
        bare = start + len(text[start:end].rstrip())
        return bare if any(text.endswith(token, start, bare) for token in self.endings) else end

    def _turn_end(self, text: str, end: int) -> int:
        """The end of the special token that closes the turn right after its content, or `end` when there is none."""
        rest = text[end:]
        blanks = len(rest) - len(rest.lstrip())
        closing = [token for token in self.endings if rest.startswith(token, blanks)]
        return end + blanks + max(map(len, closing)) if closing else end


def _as_known(message: dict[str, Any]) -> dict[str, Any]:
    """A message as transformers hands it to a template: without None values, and with reasoning under each of its names."""
    kept = {key: value for key, value in message.items() if value is not None}
    reasoning = next((kept[name] for name in _ALIASES if name in kept), None)
    return kept if reasoning is None else {"thinking": reasoning, **kept, "reasoning_content": reasoning}


# Jinja, as transformers sets it up ------------------------------------------------------------------------------------


class _Generation(Extension):
    """`{% generation %}` marks the assistant's text for transformers; here it has no effect."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_said"), [], [], body).set_lineno(line)

    def _said(self, caller: Any) -> str:
        return caller()


class _Dict:
    """`dict` without the attributes of the class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """`namespace` that stores no dunder names."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # as in Jinja, so that `namespace(self=…)` works
        self, args = args[0], args[1:]
        named = dict(*args, **kwargs)
        for name in named:
            _Namespace._check(name)
        Namespace.__init__(self, named)

    def __setitem__(self, name: Any, value: Any) -> None:
        _Namespace._check(name)
        Namespace.__setitem__(self, name, value)

    @staticmethod
    def _check(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"A namespace stores no attribute that begins with an underscore, as {name[:80]!r} does.")


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def compile_template(template: str) -> Any:
    """A compiled template. Raises TemplateError."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _refuse,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return environment.from_string(template)


# The process ----------------------------------------------------------------------------------------------------------


def _limit(memory_bytes: int) -> None:
    for what, value in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, 3),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(what)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(what, (value, value))
    # A supervisor that stops the process group gracefully waits for what is being rendered; end of input ends this process.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


_ALL_THAT_IMPORTS = (
    "{{ '\\n\\N{BULLET}' | wordwrap(9) }}{{ [1] | pprint }}{{ [1] | random }}{{ lipsum(1) }}{{ 'a' | urlencode }}"
    "{{ strftime_now('%c %Z') }}{{ [1] | tojson }}{{ raise_exception('a') }}"
)
"""Rendered once before the sandbox is entered, because Jinja and Python's codecs import parts of themselves on first use."""


def main() -> None:
    with contextlib.suppress(TemplateError):
        compile_template(_ALL_THAT_IMPORTS).render()
    lines, out = sys.stdin.buffer, sys.stdout.buffer

    def say(answer: Any) -> None:
        out.write(json.dumps(answer).encode() + b"\n")
        out.flush()

    setting = json.loads(lines.readline())
    _limit(setting.pop("memory_bytes"))
    writer = TemplateWriter(**setting)
    say("ready")
    for line in lines:
        seconds, _, chats = line.partition(b" ")
        # SIGPROF has no handler, so the kernel ends the process at any point.
        signal.setitimer(signal.ITIMER_PROF, float(seconds))
        try:
            say([writer.chat(**chat) for chat in json.loads(chats)])
        except MemoryError:
            return say({"stopped": "memory"})
        signal.setitimer(signal.ITIMER_PROF, 0)


if __name__ == "__main__":
    main()
