"""Runs batches in the web process: each request of a batch passes through the application itself, as if its person had sent it.

So an answer in a batch is what the endpoint answers, and whatever the endpoint refuses is refused here.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from app.batches import requests
from app.batches import service as batches
from app.batches.requests import RequestPlace
from app.db import transaction
from app.errors import NotFound
from app.settings import get_settings
from app.storage import files
from app.tables import File, RequestBatch
from app.web.auth import OnBehalf
from app.web.background import BackgroundAttempt, LeaseLost, WorkKind
from app.web.in_process import send_until_answered


class BatchAttempt(BackgroundAttempt):
    """One process's part of a batch: the requests without an answer, several at a time, stored every few seconds."""

    row: RequestBatch

    def __init__(self, app: FastAPI, row: RequestBatch, slots: asyncio.Semaphore) -> None:
        super().__init__(app, row, slots)
        self.who = OnBehalf(row.owner_id, row.project_id)
        self.unstored: list[dict[str, Any]] = []

    async def through(self) -> None:
        key, fence = self.row.id, self.row.fence
        path = await self.write(self._input)
        found = await self.storing(asyncio.ensure_future(run_in_threadpool(requests.find, path, self.row.endpoint)))
        if not await self.write(lambda session: batches.begin(session, key, fence, found)):
            raise LeaseLost
        if found.errors:
            return
        done = await self.write(lambda session: batches.answered(session, key))
        await self.store()
        todo = [place for place in found.places if place.line not in done]
        await self.each(todo, lambda place: self._answer(path, place))
        await self._finish(found.places)

    def _input(self, session: Session) -> Path:
        path = files.brought(session.get_one(File, self.row.input_file_id).sha256)
        if not path.is_file():
            raise NotFound("The input file was deleted.", hint="Upload it again.", code="input_file_missing")
        return path

    async def _answer(self, path: Path, place: RequestPlace) -> None:
        body = await run_in_threadpool(requests.body_of, path, place)
        sent = await send_until_answered(self.app, self.row.endpoint, body, self.who, self.slots, self.ended)
        if sent is not None:
            self.unstored.append({"line": place.line, "custom_id": place.custom_id, **sent._asdict()})

    async def store(self) -> None:
        rows, self.unstored = self.unstored, []
        batch = await self.write(lambda session: batches.store(session, self.row.id, self.row.fence, rows))
        if batch is None:
            raise LeaseLost
        if batch.finalizing_at:
            self.ended.set()

    async def fail(self, code: str, message: str) -> None:
        await self.write(lambda session: batches.fail(session, self.row.id, self.row.fence, code, message))

    async def release(self) -> None:
        await self.write(lambda session: batches.release(session, self.row.id, self.row.fence))

    async def _finish(self, places: list[RequestPlace]) -> None:
        key, fence = self.row.id, self.row.fence
        await self.store()
        if not await self.write(lambda session: batches.finalize(session, key, fence, places)):
            raise LeaseLost
        output, errors = await self.storing(asyncio.ensure_future(run_in_threadpool(_write_files, key)))
        if not await self.write(lambda session: batches.end(session, key, fence, output, errors)):
            raise LeaseLost


KIND = WorkKind("batch", batches.claim_next, BatchAttempt)


def _write_files(batch_id: uuid.UUID) -> tuple[files.Blob | None, files.Blob | None]:
    """The output file and the file of errors, as stored bytes; None for one without a line."""
    return _file_of(batch_id, good=True), _file_of(batch_id, good=False)


def _file_of(batch_id: uuid.UUID, *, good: bool) -> files.Blob | None:
    writer = files.BlobWriter(get_settings().upload_limit_bytes)
    try:
        with transaction() as session:
            for line in batches.output_lines(session, batch_id, good=good):
                writer.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        return writer.finish() if writer.bytes else None
    finally:
        writer.discard()
