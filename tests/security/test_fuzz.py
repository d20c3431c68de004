"""No request makes a 500: valid requests to every route, changed at random from a seed. `python -m tests.fuzz` runs it for long."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest
from sqlalchemy import func, select

from app import db, queue
from app.datasets import inspections
from app.kit import ids, manifest
from app.main import create_app
from app.tables import Outbox
from tests import documented
from tests.conftest import ORIGIN, csrf_token
from tests.factories import make_dataset, make_job
from tests.fuzz.asgi import Raw, ask
from tests.fuzz.run import MAX_SECONDS, Fuzz, cases, json_shape, spy
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
    "cancel_prediction", "check_engine", "classify_texts", "create_embeddings", "create_upload", "delete_prediction", "fix_dataset", "import_hub_dataset",
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


@pytest.mark.parametrize("seconds", SECONDS)
def test_requests_made_from_the_schema(seconds, web, api, session, user, tiny_registered, data_dir):
    """Valid and invalid requests as schemathesis draws them from the OpenAPI document, half of them at objects that are there."""
    import hypothesis
    import requests
    import schemathesis

    dataset = make_dataset(session, user, data_dir)
    job = make_job(session, user, tiny_registered, dataset)
    known = {
        "key": ids.public(ids.DATASET, dataset.id),
        "job_id": ids.public(ids.JOB, job.id),
        "model": "tiny",
        "file_id": ids.public(ids.FILE, dataset.file_id),
    }
    headers = {"authorization": f"Bearer {api.key}"}
    schema = schemathesis.openapi.from_dict(api.get("/v1/openapi.json").json())
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) > 70
    draw, deadline, wrong, statuses = random.Random(SEED), time.monotonic() + seconds, [], Counter()
    draw.shuffle(operations)

    def put(case: schemathesis.Case) -> None:
        if case.method != "DELETE" and draw.random() < 0.5:
            case.path_parameters = {name: known.get(name, value) for name, value in (case.path_parameters or {}).items()}
        made = case.as_transport_kwargs(base_url=ORIGIN, headers=headers)
        sent = requests.Request(**{name: made[name] for name in SENT if name in made}).prepare()
        body = sent.body.encode("utf-8", "surrogatepass") if isinstance(sent.body, str) else sent.body or b""
        named = [
            (name.lower().encode("latin-1", "replace"), value.encode("latin-1", "replace") if isinstance(value, str) else value)
            for name, value in sent.headers.items()
        ]
        path, _, query = sent.path_url.encode().partition(b"?")
        raw = Raw(sent.method, path, query, [(b"host", b"127.0.0.1:8000"), *named], body)
        answer = web.portal.call(ask, web.app, raw)
        statuses[answer.status] += 1
        offline = answer.status == 503 and '"offline"' in answer.text
        if answer.error is not None or (answer.status >= 500 and not offline) or answer.seconds > MAX_SECONDS:
            wrong.append(f"{raw}\n    {answer.status} in {answer.seconds:.1f} s {answer.error!r} {answer.text[:300]!r}")
        elif 400 <= answer.status < 500 and answer.body:
            wrong.extend(f"{raw}: {what}" for what in json_shape(answer))

    for round in itertools.count():
        for operation in operations:
            if round and time.monotonic() > deadline:  # each operation is asked at least once
                break
            quick = hypothesis.settings(
                max_examples=2, database=None, deadline=None, suppress_health_check=list(hypothesis.HealthCheck), phases=[hypothesis.Phase.generate],
            )  # fmt: skip
            mode = schemathesis.GenerationMode.NEGATIVE if round % 2 else schemathesis.GenerationMode.POSITIVE
            test = hypothesis.given(case=operation.as_strategy(generation_mode=mode))(put)
            # An operation without parameters cannot be asked wrongly, and the bytes of an upload have no serializer.
            with suppress(hypothesis.errors.Unsatisfiable, schemathesis.core.errors.SerializationNotPossible):
                hypothesis.seed(SEED + round)(quick(test))()
        else:
            continue
        break
    print(
        f"\n{sum(statuses.values())} requests from the schema, {round} rounds of {len(operations)} operations:",
        dict(sorted(statuses.items())),
    )
    assert not wrong, "\n".join(wrong[:20])


SENT = ("method", "url", "params", "json", "data", "files", "headers", "cookies")
