"""Runs evals in the web process: the model is asked through the application itself, as its person would ask it, and each answer graded."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from itertools import islice
from typing import Any

from fastapi import FastAPI
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from app import graders, limits
from app.errors import BadData, StudioError
from app.evals import criteria, sources
from app.evals import service as evals
from app.evals.criteria import Criterion
from app.evals.sources import CompletionsDataSource, FileContent, SourceItem, StoredCompletions, StoredItem
from app.graders import Ask, GradedSample, Reply
from app.inference import judges, stored
from app.inference.judges import Hear
from app.inference.protocol import GenerateRequest
from app.kit import ids
from app.kit.token_meter import TokenMeter
from app.storage import files
from app.tables import JSON, Eval, EvalRun, Exchange, User
from app.web.auth import OnBehalf
from app.web.background import BackgroundAttempt, LeaseLost, WorkKind
from app.web.in_process import send_until_answered

CHAT = "/v1/chat/completions"
GRADING_SECONDS = 600.0
"""How long one question of a grader may take."""


class EvalAttempt(BackgroundAttempt):
    """One process's part of a run: the items without a grade, several at a time, stored every few seconds."""

    row: EvalRun

    def __init__(self, app: FastAPI, row: EvalRun, slots: asyncio.Semaphore) -> None:
        super().__init__(app, row, slots)
        self.who = OnBehalf(row.owner_id, row.project_id)
        self.source = evals.the_source(row)
        self.unstored: list[JSON] = []
        self.meter = TokenMeter()
        self.loop = asyncio.get_running_loop()
        self.found: list[Criterion] = []
        self.answer: Callable[[Ask], Reply] = graders.no_models

    async def through(self) -> None:
        items = await self.storing(asyncio.ensure_future(run_in_threadpool(self._items)))
        await self.write(self._prepare)
        if await self.write(lambda session: evals.store(session, self.row.id, self.row.fence, [], len(items))) is None:
            raise LeaseLost
        done = await self.write(lambda session: evals.graded_places(session, self.row.id))
        await self.store()
        todo = [(place, one) for place, one in enumerate(items) if place not in done]
        await self.each(todo, lambda item: self._grade(*item))
        await self.store()
        if not await self.write(lambda session: evals.finish(session, self.row.id, self.row.fence)):
            raise LeaseLost

    def _items(self) -> list[SourceItem]:
        source = self.source.source
        if isinstance(source, FileContent):
            return list(source.content)
        if isinstance(source, StoredCompletions):
            return self.in_thread(self._stored_items)

        def read(session: Session) -> tuple[Any, Eval]:
            user = session.get_one(User, self.row.owner_id).work_in(self.row.project_id)
            return files.content(session, user, ids.parse(ids.FILE, source.id)), session.get_one(Eval, self.row.eval_id)

        path, found = self.in_thread(read)
        items = list(islice(sources.items_of(path), sources.MAX_ITEMS + 1))
        if not items or len(items) > sources.MAX_ITEMS:
            raise BadData(f"The file has {'no' if not items else f'more than {sources.MAX_ITEMS:,}'} items.", hint="Send another file.")
        for number, one in enumerate(items, 1):
            evals.check_item(found, one.item, f"item {number}")
        return items

    def _stored_items(self, session: Session) -> list[SourceItem]:
        """The stored chat completions that the run was made of, in its order."""
        user = session.get_one(User, self.row.owner_id).work_in(self.row.project_id)
        keys = [uuid.UUID(key) for key in self.row.stored_ids or ()]
        rows = {row.id: row for row in session.scalars(stored.mine(user, stored.COMPLETION).where(Exchange.id.in_(keys)))}
        items = [_stored_item(key, rows.get(key)) for key in keys]
        found = session.get_one(Eval, self.row.eval_id)
        for number, one in enumerate(items, 1):
            if "input" in one.item:
                evals.check_item(found, one.item, f"item {number}")
        return items

    def _prepare(self, session: Session) -> None:
        """The criteria and the models that they ask, as they are now."""
        user = session.get_one(User, self.row.owner_id).work_in(self.row.project_id)
        self.found = criteria.read(session.get_one(Eval, self.row.eval_id).criteria, prove=False)
        known = judges.resolve(session, user, [one.grader for one in self.found])
        self.answer = judges.answers(user.id, known, self._ask, self.meter)

    def _ask(self, request: GenerateRequest, hear: Hear) -> None:
        """What a grader asks a model, from the thread that grades."""
        asyncio.run_coroutine_threadsafe(judges.listen(request, hear), self.loop).result(GRADING_SECONDS)

    async def _grade(self, place: int, one: SourceItem) -> None:
        """Ask the model, where the run has one, and grade the answer. What goes wrong with one item is that item's alone."""
        sample, usage = await self._sampled(one)
        if sample is None:
            return
        results: list[JSON] = []
        if sample["error"] is None:
            said = GradedSample(sample["output"][0]["content"] or "", sample["output"][0].get("tool_calls"))
            results, more = await run_in_threadpool(self._results, said, one.item)
            usage |= more
        whole = bool(results) and not any(result.get("error") for result in results)
        status = ("pass" if all(result["passed"] for result in results) else "fail") if whole else "error"
        self.unstored.append({"place": place, "status": status, "item": one.item, "sample": sample, "results": results, "usage": usage})

    def _results(self, sample: GradedSample, item: JSON) -> tuple[list[JSON], JSON]:
        results, usage = [], dict[str, Any]()
        for one in self.found:
            graded = graders.scored(one.grader, graders.grade(one.grader, sample, item, self.answer))
            result: JSON = {
                "name": one.grader.name,
                "type": one.grader.type,
                "passed": one.passes(graded),
                "score": graded.reward,
                "sample": None,
            }
            results.append(result | ({"error": graded.why} if graded.error else {}))
            for name, tokens in graded.tokens.items():
                usage[name] = {"invocation_count": 1, "total_tokens": tokens}
        return results, usage

    async def _sampled(self, one: SourceItem) -> tuple[JSON | None, JSON]:
        """(what was sent and answered, tokens by model); None where the run ended before."""
        asks = self.source if isinstance(self.source, CompletionsDataSource) and self.source.model is not None else None
        if isinstance(one, StoredItem) and one.sample and (asks is None or one.sample["error"]):
            return dict(one.sample), {}
        if asks is None:
            return _given(one), {}
        params = asks.sampling_params.model_dump(exclude_none=True)
        try:
            messages = sources.messages_for(asks, one.item)
        except StudioError as fault:
            return _sample([], params, error={"code": fault.code or "invalid_item", "message": fault.message}), {}
        body = {"model": asks.model, "messages": messages, **params}
        sent = await send_until_answered(self.app, CHAT, body, self.who, self.slots, self.ended)
        if sent is None:
            return None, {}
        if sent.status_code != 200:
            said = sent.body.get("error") or {}
            return _sample(messages, params, error={"code": str(said.get("code")), "message": str(said.get("message"))}), {}
        choice, counted = sent.body["choices"][0], _counted(sent.body["usage"])
        seed = (sent.body.get("luthier") or {}).get("seeds", [0])[0]
        name = asks.model or ""
        sample = _sample(messages, params | {"seed": seed}, choice["message"], choice["finish_reason"], name, counted)
        return sample, {name: counted | {"invocation_count": 1}}

    async def store(self) -> None:
        rows, self.unstored = self.unstored, []
        run = await self.write(lambda session: self._stored(session, rows))
        if run is None:
            raise LeaseLost
        if run.cancel_requested:
            self.ended.set()

    def _stored(self, session: Session, rows: list[JSON]) -> EvalRun | None:
        limits.count_meter(session, EvalRun, self.row.id, self.meter)
        return evals.store(session, self.row.id, self.row.fence, rows)

    async def fail(self, code: str, message: str) -> None:
        await self.write(lambda session: evals.finish(session, self.row.id, self.row.fence, error={"code": code, "message": message}))

    async def release(self) -> None:
        await self.write(lambda session: evals.release(session, self.row.id, self.row.fence))


KIND = WorkKind("eval run", evals.claim_next, EvalAttempt)


def _stored_item(key: uuid.UUID, row: Exchange | None) -> SourceItem:
    """A stored chat completion as an item, with the answer that is stored."""
    public = ids.public(ids.CHAT_COMPLETION, key)
    if row is None or row.stored is None:
        error = {"code": "deleted", "message": "This stored chat completion was deleted after the run was made."}
        return StoredItem(item={"id": public}, sample=_sample([], {}, error=error))
    messages = stored.messages_of(row)
    item = {"id": public, "model": row.stored["model"], "created_at": row.stored["created"], "metadata": row.user_metadata or {}}
    item |= {"input": messages} | ({"tools": row.sampling["tools"]} if row.sampling.get("tools") else {})
    choice = row.stored["choices"][0]
    params = {name: row.sampling.get(name) for name in ("temperature", "top_p")} | {"seed": row.stored["luthier"]["seeds"][0]}
    params |= {"max_completion_tokens": row.sampling.get("max_tokens") or 0}
    used = _counted(row.stored["usage"])
    return StoredItem(item=item, sample=_sample(messages, params, choice["message"], choice["finish_reason"], row.stored["model"], used))


def _counted(used: JSON) -> JSON:
    """Tokens of an answer, by the names of evals."""
    counted = {name: used[name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")}
    return counted | {"cached_tokens": (used.get("prompt_tokens_details") or {}).get("cached_tokens", 0)}


def _given(one: SourceItem) -> JSON:
    """The answer that came with an item."""
    given = one.sample or {}
    text = given.get("output_text")
    if not isinstance(text, str):
        return _sample([], {}, error={"code": "invalid_item", "message": "The item has no sample.output_text to be graded."})
    tools = given.get("output_tools")
    message = {"role": "assistant", "content": text} | ({"tool_calls": tools} if isinstance(tools, list) else {})
    return _sample([], {}, message, "stop")


def _sample(
    messages: list[JSON], params: JSON, message: JSON | None = None, finish_reason: str = "", model: str = "", usage: JSON | None = None,
    error: JSON | None = None,
) -> JSON:  # fmt: skip
    """A sample as the API returns it."""
    return {
        "input": [{"role": str(one.get("role", "")), "content": str(one.get("content", ""))} for one in messages],
        "output": [
            {
                "role": "assistant",
                "content": message.get("content"),
                **({"tool_calls": message["tool_calls"]} if message.get("tool_calls") else {}),
            }
        ]
        if message
        else [],
        "finish_reason": finish_reason,
        "model": model,
        "usage": usage or dict.fromkeys(("prompt_tokens", "completion_tokens", "total_tokens", "cached_tokens"), 0),
        "error": error,
        "max_completion_tokens": params.get("max_completion_tokens", 0),
        "temperature": params.get("temperature", 1.0),
        "top_p": params.get("top_p", 1.0),
        "seed": params.get("seed", 0),
    }
