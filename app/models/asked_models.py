"""The models that graders ask: judges, reward models, and encoders for embeddings. They are found by their names in the project of whoever
grades."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from sqlalchemy.orm import Session

from app.errors import BadField, StudioError
from app.graders import Grader
from app.languages import gettext
from app.models import service as models
from app.models.service import Resolved
from app.models.vocabulary import why_apart
from app.spec import SILENT, AskedModel, ModelRef
from app.strategies import STRATEGIES
from app.tables import User


def resolve(session: Session, user: User, graders: Iterable[Grader]) -> dict[str, Resolved]:
    """The models that these graders ask, by the name that they have there; an empty name is the encoder of the project. Raises NotFound,
    Conflict and BadField."""
    found: dict[str, Resolved] = {}
    for grader in graders:
        for part in (grader, *grader.children().values()):
            for name in part.models() if not part.children() else ():
                if (key := name or "") not in found:
                    found[key] = _FINDERS.get(part.type, _judge)(session, user, name)
    return found


def of_job(session: Session, user: User, graders: Iterable[Grader]) -> tuple[AskedModel, ...]:
    """The same as a job's spec holds them."""
    return tuple(AskedModel(name=name, model=one.ref) for name, one in resolve(session, user, graders).items())


def writer(session: Session, user: User, name: str) -> Resolved:
    """A model that writes text, by its name. Raises as `models.resolve` does, and BadField for one that writes none."""
    found = models.resolve(session, user, name, allowed=True)
    if found.ref.kind in SILENT:
        raise BadField(
            gettext("%(name)s is %(kind)s: it does not write text.", name=name, kind=gettext(SILENT[found.ref.kind])),
            hint=gettext("Choose a generic, instruction or dialogue model."),
            param="model",
        )
    return found


def teacher(session: Session, user: User, name: str, student: ModelRef) -> ModelRef:
    """A teacher of a student, whose probability of every token is read. Raises BadField naming `preference.teacher`, NotFound and Conflict."""
    if not name:
        raise BadField(
            gettext("Distillation needs a teacher."),
            hint=gettext("Send preference.teacher: the name of a model."),
            param=TEACHER,
            code="missing_required_parameter",
        )
    try:
        found = writer(session, user, name)
    except StudioError as error:
        error.param = TEACHER
        raise
    if found.checkpoint is None and found.model.answered_elsewhere:
        raise BadField(
            gettext("%(name)s is answered by a server, which does not give the probability of every token.", name=name),
            hint=gettext("Take a model whose weights are here, or make a dataset of its answers."),
            param=TEACHER,
        )
    if found.ref == student:
        raise BadField(
            gettext("%(name)s is the student itself, which it can teach nothing.", name=name),
            hint=gettext("Take a stronger teacher."),
            param=TEACHER,
        )
    if found.ref.shape.encodes or student.shape.encodes:
        raise BadField(gettext("An encoder–decoder cannot be distilled token by token."), hint=gettext("Take two decoders."), param=TEACHER)
    if any(STRATEGIES[adapter.strategy]().virtual_tokens() for adapter in found.ref.adapters):
        raise BadField(
            gettext("%(name)s reads trained vectors before each text, which the student has not.", name=name),
            hint=gettext("Take another teacher."),
            param=TEACHER,
        )
    if reason := why_apart(student, found.ref):
        raise BadField(
            gettext("%(name)s has another vocabulary: %(reason)s.", name=name, reason=reason),
            hint=gettext("Take a teacher of the same family, or make a dataset of the teacher's answers."),
            param=TEACHER,
            code="other_vocabulary",
        )
    return found.ref


TEACHER = "preference.teacher"


def _judge(session: Session, user: User, name: str | None) -> Resolved:
    try:
        return writer(session, user, name or "")
    except BadField as error:
        raise BadField(error.message, hint=error.hint, param="grader.model") from None


def _reward_model(session: Session, user: User, name: str | None) -> Resolved:
    found = models.resolve(session, user, name or "")
    if found.ref.kind != "reward":
        raise BadField(
            gettext("%(name)s is no reward model.", name=name),
            hint=gettext("Fine-tune one on preference pairs with the objective reward."),
            param="grader.model",
        )
    return found


def _encoder(session: Session, user: User, name: str | None) -> Resolved:
    if name is None:
        ready = [m for m in models.offered(session, user) if m.kind == "encoder" and m.status == "ready"]
        if not ready:
            raise BadField(
                gettext("The metric cosine needs an embedding model, and this project has none."),
                hint=gettext("Add the starter all-minilm-l6-v2, or compare words: rouge_l."),
                param="grader.evaluation_metric",
            )
        name = ready[-1].name
    found = models.resolve(session, user, name)
    if found.ref.kind != "encoder":
        raise BadField(
            gettext("%(name)s is no encoder, so it gives no embeddings.", name=name),
            hint=gettext("Add the starter all-minilm-l6-v2."),
            param="grader.model",
        )
    return found


_FINDERS: dict[str, Callable[[Session, User, str | None], Resolved]] = {"text_similarity": _encoder, "reward_model": _reward_model}
"""How the models of a type of grader are found; those of all others are judges."""
