"""E-mail on a job's end: enqueued with the end, sent to a mail server that speaks SMTP."""

from __future__ import annotations

import email
import smtplib
import socketserver
import threading
from email.message import EmailMessage

import pytest
from sqlalchemy import select

from app import queue
from app.errors import BadField
from app.jobs import mail
from app.settings import get_settings
from app.tables import Job, Outbox
from tests import lives


class Mailbox(socketserver.ThreadingTCPServer):
    """A mail server of this test's own; `refusals` are answered to the first messages."""

    allow_reuse_address = daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Dialog)
        self.got: list[EmailMessage] = []
        self.refusals: list[bytes] = []


class Dialog(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        self.wfile.write(b"220 test\r\n")
        while line := self.rfile.readline():
            word = line.split()[0].upper()
            if word == b"MAIL" and self.server.refusals:
                self.wfile.write(self.server.refusals.pop(0) + b"\r\n")
            elif word == b"DATA":
                self.wfile.write(b"354 go on\r\n")
                text = b""
                while (piece := self.rfile.readline()) != b".\r\n":
                    text += piece
                self.server.got.append(email.message_from_bytes(text, policy=email.policy.default))
                self.wfile.write(b"250 taken\r\n")
            elif word == b"QUIT":
                self.wfile.write(b"221 bye\r\n")
                return
            else:
                self.wfile.write(b"250 ok\r\n")


@pytest.fixture
def mailbox(session, monkeypatch):
    with Mailbox() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        settings = get_settings()
        settings.smtp_url = f"smtp://127.0.0.1:{server.server_address[1]}"
        settings.mail_to, settings.mail_from = "anna@example.org, bert@example.org", "studio@example.org"
        settings.public_url = "https://studio.example.org"
        monkeypatch.setattr(mail, "PAUSES_SECONDS", (0.01, 0.01))
        yield server
        server.shutdown()


def messages_of(session, job: Job) -> list[str]:
    return list(session.scalars(select(Outbox.task).where(Outbox.key == job.id, Outbox.task == queue.MAIL)))


@pytest.fixture
def failed(mailbox, session, user, tiny_registered) -> Job:
    life = lives.Life(session, lives.order(session, user, tiny_registered, name="support\ntone “é”")).claim()
    job = session.get_one(Job, life.job_id)
    life.say(lives.started(), *lives.steps(1, 3))
    assert messages_of(session, job) == [], "a step is no end"
    life.fail(lives.events.Failed(kind="bad_data", message="Row 3 is empty.", hint="Fill it."))
    session.refresh(job)
    return job


def test_the_end_of_a_job_is_sent(failed, mailbox, session):
    assert messages_of(session, failed) == [queue.MAIL]
    assert mail.send(failed.id)
    (got,) = mailbox.got
    assert got["subject"] == "support tone “é”: failed" and got["to"] == "anna@example.org, bert@example.org"
    text = got.get_content()
    assert "Row 3 is empty." in text and "Fill it." in text and f"https://studio.example.org/jobs/ftjob-{failed.id.hex}" in text


def test_a_server_that_is_busy_is_tried_again_and_one_that_refuses_is_not(failed, mailbox):
    mailbox.refusals = [b"451 busy", b"451 busy"]
    assert mail.send(failed.id) and len(mailbox.got) == 1
    mailbox.refusals = [b"550 no", b"550 no"]
    with pytest.raises(smtplib.SMTPException):
        mail.send(failed.id)
    assert len(mailbox.refusals) == 1 and len(mailbox.got) == 1


def test_a_job_that_runs_again_is_not_reported(failed, mailbox, session):
    failed.status = "queued"
    session.commit()
    assert not mail.send(failed.id) and mailbox.got == []


def test_without_a_server_nothing_is_enqueued(session, user, tiny_registered):
    life = lives.Life(session, lives.order(session, user, tiny_registered)).claim()
    life.fail(lives.events.Failed(kind="bad_data", message="Row 3 is empty."))
    assert messages_of(session, session.get_one(Job, life.job_id)) == []


def test_a_password_never_goes_over_an_open_connection(failed, mailbox):
    get_settings().smtp_url = str(get_settings().smtp_url).replace("smtp://", "smtp://user:secret@")
    with pytest.raises(smtplib.SMTPNotSupportedError, match="STARTTLS"):
        mail.deliver(mail.compose(failed))
    get_settings().smtp_url = "mail.example.org"
    with pytest.raises(BadField):
        mail.deliver(mail.compose(failed))
