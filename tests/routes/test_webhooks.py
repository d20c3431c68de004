"""`/v1/webhook_endpoints`, called by the unmodified client, and deliveries to a real server, whose signatures the client checks."""

from __future__ import annotations

import threading
import time
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import openai
import pytest
from sqlalchemy import func, select, update

from app import leases, relay
from app.db import transaction
from app.jobs import service as jobs
from app.tables import Outbox, WebhookDelivery, WebhookEndpoint
from app.webhooks import delivery
from app.webhooks import service as webhooks
from tests.conftest import forget_settings
from tests.factories import make_dataset, make_job

SUCCEEDED = "fine_tuning.job.succeeded"


class Receiver(ThreadingHTTPServer):
    """Keeps what it gets, and answers with the statuses in `answers`, then 200."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.got: list[tuple[dict[str, str], bytes]] = []
        self.answers: list[int] = []
        self.address = f"http://127.0.0.1:{self.server_port}/hook"


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.server.got.append((dict(self.headers), self.rfile.read(int(self.headers["content-length"]))))
        self.send_response(self.server.answers.pop(0) if self.server.answers else 200)
        self.send_header("location", "http://127.0.0.1:9/elsewhere")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def receiver(session, monkeypatch):
    server = Receiver()
    monkeypatch.setenv("LUTHIER_WEBHOOK_HOSTS", f"hooks.example.com, 127.0.0.1:{server.server_port}")
    forget_settings()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def client(receiver, openai_client):
    if not hasattr(openai_client.webhooks, "create"):
        pytest.skip(f"the client {openai.__version__} manages no endpoints")
    return openai_client


def send_all() -> int:
    """Send what is due, as data workers do."""
    with transaction() as session:
        due = session.scalars(select(WebhookDelivery.id).where(webhooks.WORK.free())).all()
    for key in due:
        delivery.send(key)
    return len(due)


def test_an_endpoint_is_made_changed_and_deleted(client, receiver):
    assert set(client.webhooks.event_types.list().data) == set(webhooks.EVENT_TYPES)
    made = client.webhooks.create(name="ci", url=receiver.address, event_types=["batch.completed", SUCCEEDED])
    assert made.signing_secret.startswith("whsec_") and made.signing_secret_hint == f"whsec_…{made.signing_secret[-4:]}"
    assert made.event_types == [SUCCEEDED, "batch.completed"] and made.object == "webhook_endpoint"
    changed = client.webhooks.update(made.id, name="cd", event_types=["batch.failed"])
    assert (changed.name, changed.event_types, changed.url) == ("cd", ["batch.failed"], receiver.address)
    assert client.webhooks.retrieve(made.id).name == "cd" and [one.id for one in client.webhooks.list()] == [made.id]
    rotated = client.webhooks.rotate_secret(made.id)
    assert rotated.signing_secret != made.signing_secret
    assert client.webhooks.delete(made.id).deleted and client.webhooks.list().data == []
    with pytest.raises(openai.NotFoundError):
        client.webhooks.retrieve(made.id)


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"url": "https://evil.example/hook"}, "url"), ({"url": "https://hooks.example.com:8443/x"}, "url"), ({"url": "http://127.0.0.1/x"}, "url"),
        ({"url": "file:///etc/passwd"}, "url"), ({"url": "https://a:b@hooks.example.com/"}, "url"), ({"url": "https://[::1"}, "url"),
        ({"event_types": ["response.completed"]}, "event_types"), ({"event_types": []}, "event_types"), ({"name": " "}, "name"),
    ],
)  # fmt: skip
def test_what_is_refused(client, more, param):
    with pytest.raises(openai.BadRequestError) as caught:
        client.webhooks.create(**{"name": "a", "url": "https://hooks.example.com/x", "event_types": [SUCCEEDED], **more})
    assert caught.value.param == param and client.webhooks.list().data == []


def test_without_a_list_of_hosts_nothing_is_sent_anywhere(api):
    order = {"name": "a", "url": "https://hooks.example.com/x", "event_types": [SUCCEEDED]}
    refused = api.post("/v1/webhook_endpoints", json=order)
    assert refused.status_code == 400 and "LUTHIER_WEBHOOK_HOSTS" in refused.json()["error"]["message"]


def test_a_cancelled_job_is_told_once_and_the_client_checks_the_signature(client, session, user, receiver, data_dir, tiny_registered):
    made = client.webhooks.create(name="ci", url=receiver.address, event_types=["fine_tuning.job.cancelled"])
    client.webhooks.create(name="deaf", url=receiver.address, event_types=["batch.completed"])
    job = make_job(session, user, tiny_registered, make_dataset(session, user, data_dir))
    session.commit()
    with transaction() as other:
        jobs.cancel(other, user, job.id)
    assert send_all() == 1 and send_all() == 0
    ((headers, body),) = receiver.got
    event = client.webhooks.unwrap(body, headers, secret=made.signing_secret)
    assert event.type == "fine_tuning.job.cancelled" and event.data.id == f"ftjob-{job.id.hex}" and event.object == "event"
    assert event.id == headers["webhook-id"]
    with pytest.raises(openai.InvalidWebhookSignatureError):
        client.webhooks.unwrap(body.replace(b"cancelled", b"succeeded"), headers, secret=made.signing_secret)
    with transaction() as other:  # its events are reported a second time
        for key in other.scalars(select(WebhookDelivery.event_key)).all():
            webhooks.emit(other, user.project_id, "fine_tuning.job.cancelled", "again", key)
    assert send_all() == 0


def test_a_delivery_is_tried_again_until_it_is_taken(client, user, receiver):
    client.webhooks.create(name="ci", url=receiver.address, event_types=[SUCCEEDED])
    receiver.answers = [500, 302]
    with transaction() as session:
        webhooks.emit(session, user.project_id, SUCCEEDED, "ftjob-1")
    for tries, code in ((1, 500), (2, 302)):
        assert send_all() == 1 and send_all() == 0, "it waits for its time"
        with transaction() as session:
            row = session.scalars(select(WebhookDelivery)).one()
            assert (row.status, row.tries, row.status_code, row.error) == ("queued", tries, code, f"It answered {code}.")
            pause = (row.next_at - session.scalar(select(func.clock_timestamp()))).total_seconds()
            assert webhooks.PAUSES_SECONDS[tries - 1] - 3 < pause <= webhooks.PAUSES_SECONDS[tries - 1]
            row.next_at = leases.now()
    assert send_all() == 1
    with transaction() as session:
        row = session.scalars(select(WebhookDelivery)).one()
        assert (row.status, row.tries, row.error) == ("succeeded", 3, None)
    assert len({headers["webhook-id"] for headers, _ in receiver.got}) == 1 and len(receiver.got) == 3


def test_after_three_days_it_is_given_up_and_forgotten_later(client, user, receiver):
    client.webhooks.create(name="ci", url=receiver.address, event_types=[SUCCEEDED])
    receiver.shutdown()
    receiver.server_close()
    with transaction() as session:
        webhooks.emit(session, user.project_id, SUCCEEDED, "ftjob-1")
        session.execute(update(WebhookDelivery).values(tries=len(webhooks.PAUSES_SECONDS)))
    assert send_all() == 1
    with transaction() as session:
        row = session.scalars(select(WebhookDelivery)).one()
        assert row.status == "failed" and "could not be reached" in row.error
        row.finished_at = leases.now() - webhooks.KEPT
    with transaction() as session:
        webhooks.reap(session)
        assert session.scalar(select(func.count()).select_from(WebhookDelivery)) == 0
    assert 71 * 3600 < sum(webhooks.PAUSES_SECONDS) < 73 * 3600


def test_the_reaper_announces_what_is_due(client, user, receiver):
    client.webhooks.create(name="ci", url=receiver.address, event_types=[SUCCEEDED])
    with transaction() as session:
        webhooks.emit(session, user.project_id, SUCCEEDED, "ftjob-1")
    with transaction() as session:
        assert session.scalars(select(Outbox.task)).all().count("luthier.webhook") == 1
        session.query(Outbox).delete()
        relay._reap(session)
        assert session.scalars(select(Outbox.task)).all() == ["luthier.webhook"]
        session.query(Outbox).delete()
        session.execute(update(WebhookDelivery).values(next_at=func.clock_timestamp() + func.make_interval(0, 0, 0, 1)))
        relay._reap(session)
        assert session.scalars(select(Outbox.task)).all() == []


def test_both_secrets_sign_for_a_day(client, user, receiver):
    old = client.webhooks.create(name="ci", url=receiver.address, event_types=[SUCCEEDED])
    new = client.webhooks.rotate_secret(old.id, keep_old_secret_active_for_24_hours=True)
    assert client.webhooks.test(old.id, event_type=SUCCEEDED).status_code == 200
    headers, body = receiver.got[-1]
    for secret in (old.signing_secret, new.signing_secret):
        assert client.webhooks.unwrap(body, headers, secret=secret).type == SUCCEEDED
    with transaction() as session:
        session.execute(update(WebhookEndpoint).values(old_until=leases.now()))
    client.webhooks.test(old.id, event_type=SUCCEEDED)
    headers, body = receiver.got[-1]
    with pytest.raises(openai.InvalidWebhookSignatureError):
        client.webhooks.unwrap(body, headers, secret=old.signing_secret)


def test_a_sample_says_what_the_endpoint_answered(client, receiver, monkeypatch):
    made = client.webhooks.create(name="ci", url=receiver.address, event_types=[SUCCEEDED])
    receiver.answers = [418]
    assert client.webhooks.test(made.id, event_type="batch.failed").status_code == 418
    with pytest.raises(openai.BadRequestError):
        client.webhooks.test(made.id, event_type="video.completed")
    monkeypatch.setenv("LUTHIER_WEBHOOK_HOSTS", "hooks.example.com")  # taken off the list later
    forget_settings()
    with pytest.raises(openai.InternalServerError, match="sends no webhooks to 127"):
        client.webhooks.test(made.id, event_type=SUCCEEDED)
    assert len(receiver.got) == 1


def test_the_page_makes_tests_and_deletes_an_endpoint(client, receiver, web, session, user):
    from starlette.testclient import TestClient

    from app.web import auth
    from tests.conftest import ORIGIN, csrf_token

    link = auth.new_sign_in_link(session, user)
    session.commit()
    browser = TestClient(web.app, base_url=ORIGIN, headers={"origin": ORIGIN})
    browser.headers["x-csrf-token"] = csrf_token(browser.get(link).text)
    made = browser.post("/settings/webhooks", data={"name": "<i>ci", "url": receiver.address, "event_types": [SUCCEEDED]})
    (one,) = client.webhooks.list()
    assert "whsec_" in made.text and "&lt;i&gt;ci" in made.text and one.name == "<i>ci"
    assert "whsec_" + made.text.split("OPENAI_WEBHOOK_SECRET=whsec_")[1][:44] not in browser.get("/settings/webhooks").text
    assert "answered 200" in browser.post(f"/settings/webhooks/{one.id}/test").text and len(receiver.got) == 1
    with transaction() as other:
        webhooks.emit(other, user.project_id, SUCCEEDED, f"ftjob-{uuid.uuid4().hex}")
    send_all()
    assert "Delivered" in browser.get("/settings/webhooks").text
    assert "No event type" in browser.post("/settings/webhooks", data={"name": "b", "url": receiver.address}).text
    assert "Nothing more is sent" in browser.post(f"/settings/webhooks/{one.id}/delete").text and not client.webhooks.list().data


def test_signatures_are_those_of_the_standard():
    """The example of the Standard Webhooks specification."""
    body = '{"test": 2432232314}'
    found = delivery.signed("msg_p5jXN8AQM9LWM0D4loKWxJek", body, ["whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"], at=1614265330)
    assert found["webhook-signature"] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=" and time.time() > 1614265330
