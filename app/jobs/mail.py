"""E-mail on a job's end: a task of the data workers, enqueued in the transaction that ends the job."""

from __future__ import annotations

import logging
import smtplib
import ssl
import time
import uuid
from collections.abc import Sequence
from email.message import EmailMessage
from email.utils import formatdate, make_msgid
from urllib.parse import parse_qs, unquote, urlsplit

from sqlalchemy.orm import Session

from app import queue
from app.db import transaction
from app.errors import BadField
from app.events import Failed, Finished, JobEvent, Stopped
from app.kit import humanize, ids
from app.settings import get_settings
from app.tables import Job

log = logging.getLogger(__name__)

PAUSES_SECONDS = (2.0, 20.0, 120.0)
"""Before each further try of a server that does not take the message."""
TIMEOUT_SECONDS = 30.0


def on_events(session: Session, job_id: uuid.UUID, said: Sequence[JobEvent]) -> None:
    """Enqueue the message, if one of the events ends or pauses the job and a mail server is configured."""
    if any(isinstance(event, Finished | Failed | Stopped) for event in said) and get_settings().smtp_url and recipients():
        queue.enqueue(session, queue.MAIL, job_id)


def recipients() -> list[str]:
    return [address.strip() for address in get_settings().mail_to.split(",") if address.strip()]


def send(job_id: uuid.UUID) -> bool:
    """Send the message about a job as it is now; False when it was deleted or runs again. A server that is away is tried again."""
    with transaction() as session:
        job = session.get(Job, job_id)
        if job is None or job.deleted_at is not None or job.status in ("queued", "running"):
            return False
        message = compose(job)
    for pause in (*PAUSES_SECONDS, None):
        try:
            deliver(message)
            return True
        except (OSError, smtplib.SMTPException) as error:
            if pause is None or (isinstance(error, smtplib.SMTPResponseException) and error.smtp_code >= 500):
                raise
            log.warning("The mail server did not take a message, trying again in %g s: %s", pause, error)
            time.sleep(pause)
    raise AssertionError


def compose(job: Job) -> EmailMessage:
    """A short plain text: how it ended, why, and where to look."""
    settings, public = get_settings(), ids.public(ids.JOB, job.id)
    lines = [f"The run “{job.name}” ({public}) is {job.status} at step {job.step} of {job.total_steps or '?'}."]
    if job.error:
        lines += ["", str(job.error.get("message", "")), str(job.error.get("hint") or "")]
    if job.measured and job.status == "succeeded":
        lines += ["", f"It took {humanize.human_seconds(job.measured['seconds'])}."]
    lines += ["", f"{settings.address}/jobs/{public}"]
    message = EmailMessage()
    message["Subject"] = " ".join(f"{job.name}: {job.status}".split())
    message["From"], message["To"] = settings.mail_from, ", ".join(recipients())
    message["Date"], message["Message-ID"] = formatdate(), make_msgid(domain="luthier.invalid")
    message.set_content("\n".join(lines))
    return message


def deliver(message: EmailMessage) -> None:
    """By the server of LUTHIER_SMTP_URL. A password is only sent over TLS."""
    parts = urlsplit(get_settings().smtp_url or "")
    if parts.scheme not in ("smtp", "smtps") or not parts.hostname:
        raise BadField("LUTHIER_SMTP_URL is no address of a mail server.", hint="Write smtp://user:password@host:587 or smtps://…:465.")
    context = ssl.create_default_context()
    if parts.scheme == "smtps":
        server: smtplib.SMTP = smtplib.SMTP_SSL(parts.hostname, parts.port or 465, timeout=TIMEOUT_SECONDS, context=context)
    else:
        server = smtplib.SMTP(parts.hostname, parts.port or 587, timeout=TIMEOUT_SECONDS)
    with server:
        if parts.scheme == "smtp" and (parts.username or parse_qs(parts.query).get("tls") == ["required"]):
            server.starttls(context=context)
        if parts.username:
            server.login(unquote(parts.username), unquote(parts.password or ""))
        server.send_message(message)
