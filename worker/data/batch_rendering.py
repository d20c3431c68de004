"""Batched `render_row`: the ids and masks of many rows, with the texts of a whole batch encoded by one call.

The rows go through the parts of `render_row` itself, with a stand-in for the tokenizer that records each text to be encoded and
returns a placeholder. So there is one renderer, and nothing here knows how a row is rendered. While the texts of one batch are
encoded, the chat template renders the next: a fast tokenizer releases the GIL, and the template has a process of its own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

from app.errors import BadData
from worker.data import template_pool
from worker.data.chat_template import RenderedRow, TemplateChat, as_trained, characters, chat_of, lay_out, template_of

if TYPE_CHECKING:
    from app.run_settings import TrainOn

BATCH_ROWS, BATCH_CHARACTERS, WAITING_BATCHES = 128, 1 << 20, 3
T = TypeVar("T")
Product = TypeVar("Product")


class _Later:
    """Stand-in for a tokenizer. Each text to be encoded is recorded, and two negative numbers are returned as its ids: the first
    stands for no token, so that the mask of a first token falls on it, and the second for the whole text."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.texts: list[str] = []

    def __call__(self, text: str, add_special_tokens: bool = True, **rest: Any) -> dict[str, list[int]]:
        if add_special_tokens:
            return self._tokenizer(text, add_special_tokens=True, **rest)
        self.texts.append(text)
        return {"input_ids": [1 - 2 * len(self.texts), -2 * len(self.texts)]}

    def __len__(self) -> int:
        return len(self._tokenizer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


class Length(NamedTuple):
    """Length of a rendered row: its tokens, its trained tokens, and the position of the first trained one, or None."""

    tokens: int
    learnt: int
    first: int | None


class Renderer(Generic[T, Product]):
    """Renders rows in batches and passes each on, in order, to `done(tag, the result or its BadData)`.

    `encode` maps the texts of a batch to values, and `make` combines a row's draft with its values: ids for rows, counts for
    lengths.
    """

    def __init__(
        self,
        tokenizer: Any,
        kind: str,
        encode: Callable[[Any, list[str]], list[T]],
        make: Callable[[RenderedRow, Sequence[T]], Product],
        done: Callable[[Any, Product | BadData], None],
        train_on: TrainOn = "assistant",
    ) -> None:
        self.train_on = train_on
        self.tokenizer, self.kind, self.encode, self.make, self.done = tokenizer, kind, encode, make, done
        self._rows: list[tuple[Any, dict[str, Any]]] = []
        self._characters = 0
        self._waiting: deque[Future[tuple[list[tuple[Any, RenderedRow | BadData]], list[T]]]] = deque()
        self._writing, self._encoding = ThreadPoolExecutor(1, "write"), ThreadPoolExecutor(1, "encode")

    def add(self, tag: Any, row: dict[str, Any]) -> None:
        row = as_trained(row)
        self._rows.append((tag, row))
        self._characters += characters(row)
        if len(self._rows) >= BATCH_ROWS or self._characters >= BATCH_CHARACTERS:
            self._send()

    def _send(self) -> None:
        written = self._writing.submit(self._write, self._rows)
        self._waiting.append(self._encoding.submit(self._encode, self._rows, written))
        self._rows, self._characters = [], 0
        while len(self._waiting) > WAITING_BATCHES:
            self._finish_one()

    def _write(self, rows: list[tuple[Any, dict[str, Any]]]) -> list[tuple[TemplateChat | None, Any]]:
        """For each row its request to the chat template, and the rendered text or the error."""
        asked = [_or_error(chat_of, self.tokenizer, row, self.kind) for _, row in rows]
        chats = [one.chat for one in asked if isinstance(one, TemplateChat)]
        written = iter(template_pool.write_many(self.tokenizer, template_of(self.tokenizer), chats))
        return [(one, next(written)) if isinstance(one, TemplateChat) else (None, one) for one in asked]

    def _encode(
        self, rows: list[tuple[Any, dict[str, Any]]], written: Future[list[tuple[TemplateChat | None, Any]]]
    ) -> tuple[list[tuple[Any, RenderedRow | BadData]], list[T]]:
        """The rows as drafts, and the encoded values of their texts."""
        later, drafts = _Later(self.tokenizer), list[tuple[Any, RenderedRow | BadData]]()
        for (tag, row), (asked, text) in zip(rows, written.result(), strict=True):
            drafts.append((tag, text if isinstance(text, BadData) else _or_error(lay_out, later, row, 1 << 30, text, asked, self.train_on)))
        return drafts, self.encode(self.tokenizer, later.texts)

    def _finish_one(self) -> None:
        drafts, encoded = self._waiting.popleft().result()
        for tag, draft in drafts:
            self.done(tag, draft if isinstance(draft, BadData) else self.make(draft, encoded))

    def finish(self) -> None:
        """Process the rows that are still waiting."""
        self._send()
        while self._waiting:
            self._finish_one()
        self._writing.shutdown()
        self._encoding.shutdown()


def _or_error(function: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except BadData as error:
        return error


def render_rows(tokenizer: Any, rows: Iterable[dict[str, Any]], kind: str, max_length: int) -> list[RenderedRow | BadData]:
    """`render_row` of each row, or the BadData it raises."""
    found: list[RenderedRow | BadData] = []
    renderer = Renderer(
        tokenizer, kind, ids_of, lambda draft, ids: filled(draft, ids, max_length), lambda tag, outcome: found.append(outcome)
    )
    for row in rows:
        renderer.add(None, row)
    renderer.finish()
    return found


def ids_of(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Ids of each text, without special tokens."""
    many = getattr(tokenizer, "encode_many", None)
    if many or not texts:
        return many(texts) if many else []
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]


def counts_of(tokenizer: Any, texts: list[str]) -> list[int]:
    """Number of ids of each text."""
    many = getattr(tokenizer, "count_many", None)
    return many(texts) if many else [len(ids) for ids in ids_of(tokenizer, texts)]


def length_of(draft: RenderedRow, counts: Sequence[int]) -> Length:
    """The length of a rendered row, without building its ids."""
    tokens, learnt, first = 0, 0, None
    for number, taught in zip(draft.ids, draft.trained, strict=True):
        size = 1 if number >= 0 else 0 if number % 2 else counts[-number // 2 - 1]
        begin = max(tokens, 1)  # the first token has no predecessor that could predict it
        tokens += size
        if taught and tokens > begin:
            learnt += tokens - begin
            first = begin if first is None else first
    return Length(tokens, learnt, first)


def filled(draft: RenderedRow, encoded: Sequence[list[int]], max_length: int) -> RenderedRow:
    """A draft with its placeholders replaced by the ids of its texts."""
    ids: list[int] = []
    trained: list[bool] = []
    for number, learnt in zip(draft.ids, draft.trained, strict=True):
        if number >= 0:
            ids.append(number)
            trained.append(learnt)
        elif number % 2 == 0:
            piece = encoded[-number // 2 - 1]
            ids += piece
            trained += [learnt] * len(piece)
    if trained:
        trained[0] = False  # the first token has no predecessor that could predict it
    return RenderedRow(ids[:max_length], trained[:max_length], len(ids) > max_length)
