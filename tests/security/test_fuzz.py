"""No request makes a 500: valid requests to every route, changed at random from a seed. `python -m tests.fuzz` runs it for long."""

from __future__ import annotations

import asyncio
import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from sqlalchemy import func, select

from app import db, queue
from app.datasets import inspections
from app.kit import manifest
from app.main import create_app
from app.tables import Outbox
from tests import documented
from tests.conftest import csrf_token
from tests.fuzz.run import Fuzz, cases, spy
from tests.fuzz.world import World
from tests.generating import _workers, answering_dir, generate_worker, register_tiny  # noqa: F401

SECONDS = [
    float(os.environ.get("FUZZ_SECONDS", "5")),
    pytest.param(60.0, marks=[pytest.mark.fault, pytest.mark.timeout(600)]),
]
SEED = int(os.environ.get("FUZZ_SEED", "7"))


@contextmanager
def inspector() -> Iterator[None]:
    """The data worker's part in answers: questions about rows. Files that were ordered to be read stay unread."""
    stop = threading.Event()

    def take() -> list:
        with db.transaction() as session:
            query = select(Outbox).where(Outbox.sent_at.is_(None), Outbox.task == queue.INSPECT).order_by(Outbox.id)
            found = session.scalars(query.limit(4)).all()
            for message in found:
                message.sent_at = func.clock_timestamp()
            return [message.key for message in found]

    def work() -> None:
        while not stop.is_set():
            for key in take():
                inspections.answer(key)
            time.sleep(0.05)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(60)


@pytest.fixture
def fuzz(session, user, client, api, data_dir, tiny_model, generate_worker, monkeypatch) -> Iterator[Fuzz]:  # noqa: F811
    shutil.copytree(tiny_model, data_dir / "models" / "tiny")
    base = register_tiny(session)
    base.revision = manifest.write(data_dir / "models" / "tiny")["revision"]
    session.commit()
    world = World(session, user, data_dir, base, tiny_model)
    token = csrf_token(client.get("/").text)
    cookies = "; ".join(f"{name}={value}" for name, value in client.cookies.items())
    page = [(b"cookie", cookies.encode()), (b"x-csrf-token", token.encode()), (b"origin", b"http://127.0.0.1:8000")]
    found = Fuzz(create_app(), world, [(b"authorization", f"Bearer {api.key}".encode())], page, SEED)
    spy(found, monkeypatch)
    with inspector():
        yield found


def test_a_route_without_a_sample_is_told(web):
    assert len(cases(web.app)) > 150
    web.app.post("/v1/unheard-of")(lambda: None)
    with pytest.raises(LookupError, match="/v1/unheard-of"):
        cases(web.app)


NOT_ANSWERED = {
    "cancel_prediction", "check_engine", "classify_texts", "create_embeddings", "create_upload", "create_webhook_endpoint", "retrieve_eval_output_item", "test_webhook_endpoint", "delete_prediction", "fix_dataset", "import_hub_dataset",
    "keep_job_checkpoint", "list_hub_models", "push_export", "register_engine", "remove_engine", "resume_job", "retrieve_export_file", "retrieve_prediction", "retrieve_prediction_content", "retry_dataset",
    "retry_dataset_deprecated", "stream_job_events",
}  # fmt: skip
"""Operations of the API whose valid request here may be refused, or is a stream that nobody hears to its end: tests of their own
get, and so check, their good answers."""


@pytest.mark.long
@pytest.mark.parametrize("seconds", SECONDS)
def test_no_request_makes_a_500(fuzz, seconds):
    async def all_of_it() -> tuple[list[str], set[str], int]:
        documented.checked.clear()
        before, seen = await fuzz.valid(), good_answers()
        count = await fuzz.run(seconds)
        return before + await fuzz.valid(), seen, count

    began = time.monotonic()
    wrong, seen, count = asyncio.run(all_of_it())
    known = {operation["operationId"] for found in documented.contract().document["paths"].values() for operation in found.values()}
    unchecked = known - seen - NOT_ANSWERED
    assert known >= NOT_ANSWERED and not unchecked, f"their good answers were not checked against the document: {sorted(unchecked)}"
    five = sum(n for status, n in fuzz.statuses.items() if status >= 500 or status == 0) - fuzz.meant
    print(
        f"\n{count} mutations of {len(fuzz.cases)} routes in {time.monotonic() - began:.0f} s, seed {SEED}: {five} answers of 5xx or none,"
        f" besides {fuzz.meant} of 503 that say the studio is offline."
    )
    print("by status:", dict(sorted(fuzz.statuses.items())), f"slowest {fuzz.slowest[0]:.1f} s")
    for problem in fuzz.problems:
        print("  ", problem)
    for kind, times in fuzz.kinds.most_common():
        print(f"  {times:5} × {kind}")
    assert not wrong, "valid requests that are not honored:\n" + "\n".join(wrong)
    assert not fuzz.problems, "\n".join(fuzz.problems)


def good_answers() -> set[str]:
    """The operations that answered as their model says."""
    return {name for name, status in map(str.split, documented.checked) if status < "300"}
