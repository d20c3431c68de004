"""Divides an answer that comes in pieces into reasoning, content and tool calls.

Nothing that was told is taken back: a piece waits while a marker may begin at its end, and a call until it is complete. Whatever cannot
be read as a call is content, with its markers, so no text is lost. White space between the parts is dropped. Only where a grammar forces
calls is their form known before they end: their arguments are then told piece by piece.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from app.answer_syntax import NAME, Syntax
from app.answer_syntax._base import ToolCall
from app.answer_syntax._json_calls import JsonEnd
from app.kit.overlap import overlap


class Thought(NamedTuple):
    """A piece of the reasoning."""

    text: str


class Said(NamedTuple):
    """A piece of the content."""

    text: str


class CallPiece(NamedTuple):
    """A piece of a call that is being written. The first one has the function's name and no arguments yet."""

    name: str | None
    arguments: str


Part = Thought | Said | ToolCall | CallPiece


class Splitter:
    """One answer to a request with these tools. `push` each piece of it, and `end` it once."""

    def __init__(self, syntax: Syntax, tools: Sequence[Mapping[str, Any]] = ()) -> None:
        self.syntax, self.family, self.tools = syntax, syntax.family, tools
        self.opens = self.family.opens if self.family else ""
        self.held = ""
        """Text that is not decided on."""
        self.space = ""
        """White space before `held` that is dropped where a part ends."""
        self.looked = 0
        """Characters of `held` in which no closing marker begins."""
        self.state = "thought" if syntax.in_thought else "start"
        self.may_think = syntax.thought is not None and not syntax.in_thought
        self.has_thought = False
        self.after_part = False
        self.num_calls = 0
        self.has_said = False
        """Content was told since the last call."""
        self.parted = False
        """Between that content and what follows a call was left out."""
        self.forced, self.arguments = syntax.forced, JsonEnd()

    def push(self, text: str) -> list[Part]:
        self.held += text
        return self._run(final=False)

    def end(self) -> list[Part]:
        """The rest, when no text follows."""
        return self._run(final=True)

    def _run(self, *, final: bool) -> list[Part]:
        parts: list[Part] = []
        while getattr(self, f"_{self.state}")(parts, final):
            pass
        return [part for part in parts if isinstance(part, ToolCall | CallPiece) or part.text]

    # The states. Each handles a part of what is held, and says whether another may follow at once. --------------------------

    def _start(self, parts: list[Part], final: bool) -> bool:
        """Before the first word of the answer, or after a part of it."""
        words = self.held.lstrip()
        wanted = [self.syntax.thought[0]] if self.may_think and self.syntax.thought else []
        if any(words.startswith(marker) for marker in wanted):
            self.held, self.space, self.state, self.may_think = words[len(wanted[0]) :], "", "thought", False
            return True
        if not final and (not words or any(marker.startswith(words) for marker in wanted)):
            return False
        if self.after_part:
            self.held, self.space = words, "\n" if words and self.parted else ""
        self.may_think, self.after_part = False, False
        if self.forced is not None and not self.num_calls:
            self.state, self.opening = "opening", self.forced.first + self.forced.before
            return True
        return self._free()

    def _free(self) -> bool:
        """The rest is text, in which calls may stand."""
        words, self.forced = self.held.lstrip(), None
        self.state = "bare" if self.family and self.family.bare and words.startswith("{") else "content"
        return True

    def _thought(self, parts: list[Part], final: bool) -> bool:
        assert self.syntax.thought is not None
        closes = self.syntax.thought[1]
        at = self.held.find(closes)
        if at < 0:
            self._tell(Thought, parts, closes, final)
            return False
        rest = self.held[at + len(closes) :]
        self.held = self.held[:at]
        self._tell(Thought, parts, closes, True)
        self._begin_part(rest)
        return True

    def _content(self, parts: list[Part], final: bool) -> bool:
        at = self.held.find(self.opens) if self.opens else -1
        if at < 0:
            self._tell(Said, parts, self.opens, final)
            return False
        before = self.space + self.held[:at]
        self._say(parts, before.rstrip())
        self.space = before[len(before.rstrip()) :]
        self.held, self.looked, self.state = self.held[at + len(self.opens) :], 0, "call"
        return True

    def _call(self, parts: list[Part], final: bool) -> bool:
        """Inside of a call, whose opening marker has been taken."""
        assert self.family is not None
        closes = self.family.closes or self.opens
        at = self.held.find(closes, self.looked)
        if at < 0 and not final:
            self.looked = max(0, len(self.held) - len(closes) + 1)
            return False
        inside, closed = (self.held, "") if at < 0 else (self.held[:at], closes if self.family.closes else "")
        rest = "" if at < 0 else self.held[at + len(closed) :]
        self._take_calls(parts, inside, self.opens + inside + closed, rest)
        return at >= 0

    def _bare(self, parts: list[Part], final: bool) -> bool:
        """An answer that may be calls without markers, which only its end can tell."""
        if final:
            text, self.held = self.held, ""
            self._take_calls(parts, text, text, "")
        return False

    # Where calls are forced: `opening` with the function's name, `arguments`, and `closing`, after which another call may open. ---

    def _opening(self, parts: list[Part], final: bool) -> bool:
        before, _, after = self.opening.partition(NAME)
        if self.held.startswith(before) and (end := self.held.find(after, len(before))) >= 0:
            parts.append(CallPiece(self.held[len(before) : end], ""))
            self.held, self.state, self.arguments = self.held[end + len(after) :], "arguments", JsonEnd()
            self.num_calls += 1
            return True
        waits = self.held.startswith(before) or before.startswith(self.held)
        return False if waits and not final else self._free()

    def _arguments(self, parts: list[Part], final: bool) -> bool:
        end = self.arguments.find(self.held)
        text, self.held = self.held[:end], self.held[end:]
        if text:
            parts.append(CallPiece(None, text))
        if not self.arguments.ended:
            return False
        self.state = "closing"
        return True

    def _closing(self, parts: list[Part], final: bool) -> bool:
        assert self.forced is not None
        form, after = self.forced, self.forced.after
        self.opening = (form.between or "") + form.before
        begin = after + self.opening.partition(NAME)[0]
        if form.between is not None and self.held.startswith(begin):
            self.held, self.state = self.held[len(after) :], "opening"
            return True
        if not final and (begin.startswith(self.held) or (after + form.last).startswith(self.held)):
            return False
        self.held = self.held.removeprefix(after).removeprefix(form.last)
        if (after + form.last).startswith(self.held):
            self.held = ""  # it was cut off within the end of a call
        self._begin_part(self.held)
        return True

    # What the states share ----------------------------------------------------------------------------------------------

    def _take_calls(self, parts: list[Part], inside: str, written: str, rest: str) -> None:
        """The calls in a text, or what was `written` as content where there are none."""
        assert self.family is not None
        calls = self.family.read(inside, self.tools)
        if not calls:
            self._say(parts, self.space + written)
            self.held, self.space, self.state = rest, "", "content"
            return
        for call in calls:
            if self.syntax.parallel or not self.num_calls:
                parts.append(call)
                self.num_calls += 1
                self.has_said = False
        self._begin_part(rest)
        self.parted = self.has_said

    def _say(self, parts: list[Part], text: str) -> None:
        parts.append(Said(text))
        self.has_said = self.has_said or bool(text)

    def _begin_part(self, rest: str) -> None:
        self.held, self.space, self.state, self.after_part, self.parted = rest, "", "start", True, False

    def _tell(self, kind: type[Thought] | type[Said], parts: list[Part], marker: str, whole: bool) -> None:
        """All that is held, but what may begin a marker and white space that a part may end with, unless this is the `whole` rest."""
        cut = len(self.held) - (0 if whole else overlap(self.held, marker))
        text, self.held = self.space + self.held[:cut], self.held[cut:]
        if kind is Thought and not self.has_thought:
            text = text.lstrip()
        told = text if whole and kind is Said else text.rstrip()
        self.space = "" if whole else text[len(told) :]
        self.has_thought = self.has_thought or (kind is Thought and bool(told))
        if kind is Said:
            self._say(parts, told)
        else:
            parts.append(Thought(told))
