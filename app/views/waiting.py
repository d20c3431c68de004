"""Why a job or an evaluation that is queued does not run yet, in words."""

from __future__ import annotations

from markupsafe import Markup, escape
from sqlalchemy.orm import Session

from app.evaluation import train_queue
from app.kit.humanize import human_number, human_seconds
from app.languages import gettext
from app.machines import heartbeats
from app.tables import Evaluation, Job

SOON_SECONDS = 10


def in_words(session: Session, one: Job | Evaluation) -> str | Markup:
    """Where it stands in the queue of the train workers, and what helps."""
    queue = "train" if isinstance(one, Job) else "evaluate"
    if not any(worker.queue == queue for worker in heartbeats.alive()):
        return _no_worker(isinstance(one, Job))
    place = train_queue.places(session).get(one.id)
    if place and place.nowhere:
        return f"{place.waits_for} {gettext('It starts by itself once a worker has that; or clone it and ask for less.')}"
    if place and place.waits_for:
        return f"{place.waits_for} {gettext('It starts by itself when another run has ended.')}"
    left = place.seconds_left() if place else None
    if place is None or left is None or left < SOON_SECONDS:
        return gettext("A worker takes it in a moment.")
    said = [_expected(place.position, human_seconds(left)), gettext("Who has used less of the machine lately is served first.")]
    if isinstance(one, Job) and one.priority != "normal":
        said.append(gettext("Its priority is high.") if one.priority == "high" else gettext("Its priority is low."))
    return " ".join(said)


def _no_worker(for_run: bool) -> Markup:
    run = gettext("No train worker is online. %(command)s starts one on this machine; the run then starts by itself.")
    evaluation = gettext("No evaluate worker is online. %(command)s starts one on this machine; the evaluation then starts by itself.")
    return escape(run if for_run else evaluation) % {"command": Markup("<code>luthier up</code>")}


def _expected(position: int, time: str) -> str:
    if position == 1:
        return gettext("It is next in the queue, and expected to start in about %(time)s.", time=time)
    return gettext(
        "It is number %(number)s in the queue, and expected to start in about %(time)s.", number=human_number(position), time=time
    )
