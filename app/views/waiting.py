"""Why a job or an evaluation that is queued does not run yet, in words."""

from __future__ import annotations

from markupsafe import Markup
from sqlalchemy.orm import Session

from app.evaluation import train_queue
from app.kit.humanize import human_number, human_seconds
from app.machines import heartbeats
from app.tables import Evaluation, Job

SOON_SECONDS = 10


def in_words(session: Session, one: Job | Evaluation) -> str | Markup:
    """Where it stands in the queue of the train workers, and what helps."""
    queue, what = ("train", "run") if isinstance(one, Job) else ("evaluate", "evaluation")
    if not any(worker.queue == queue for worker in heartbeats.alive()):
        return Markup("No {} worker is online. <code>luthier up</code> starts one on this machine; the {} then starts by itself.").format(
            queue, what
        )
    place = train_queue.places(session).get(one.id)
    if place and place.nowhere:
        return f"{place.waits_for} It starts by itself once a worker has that; or clone it and ask for less."
    if place and place.waits_for:
        return f"{place.waits_for} It starts by itself when another run has ended."
    left = place.seconds_left() if place else None
    if place is None or left is None or left < SOON_SECONDS:
        return "A worker takes it in a moment."
    first = "It is next in the queue" if place.position == 1 else f"It is number {human_number(place.position)} in the queue"
    why = f" Its priority is {one.priority}." if isinstance(one, Job) and one.priority != "normal" else ""
    return f"{first}, and expected to start in about {human_seconds(left)}. Who has used less of the machine lately is served first.{why}"
