"""Projects: their members, links that show one to guests, and what happens to a person's things when the person leaves."""

from __future__ import annotations

import secrets
import uuid
from typing import Any, NamedTuple

from sqlalchemy import Select, delete, func, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from app import limits
from app.db import touched
from app.errors import BadField, Conflict, Forbidden, NotFound
from app.kit import ids
from app.kit.json_safe import storable
from app.languages import gettext, mark
from app.tables import Base, BrowserSession, Comparison, Job, Project, ProjectMember, ShareLink, User
from app.web import people
from app.web.auth import sha256
from app.web.policy import check_role


class Membership(NamedTuple):
    project: Project
    role: str


# Finding --------------------------------------------------------------------------------------------------------------


def of_person(session: Session, user_id: uuid.UUID) -> list[Membership]:
    """A person's projects with the role in each, their own first."""
    query = select(Project, ProjectMember.role).join(ProjectMember, ProjectMember.project_id == Project.id)
    query = query.where(ProjectMember.user_id == user_id)
    return [Membership(*row) for row in session.execute(query.order_by(Project.personal.desc(), Project.name, Project.id))]


def query() -> Select[Project]:
    return select(Project)


def get(session: Session, project_id: uuid.UUID) -> Project:
    found = session.get(Project, project_id)
    if found is None:
        raise _none(project_id)
    return found


def membership(session: Session, user: User, project_id: uuid.UUID) -> Membership:
    """A project that this person is a member of. Raises NotFound for any other."""
    member = session.get(ProjectMember, (project_id, user.id))
    if member is None:
        raise _none(project_id)
    return Membership(get(session, project_id), member.role)


def _none(project_id: uuid.UUID) -> NotFound:
    message = gettext("No such project: %(id)s", id=ids.public(ids.PROJECT, project_id))
    return NotFound(message, param="project_id", hint=gettext("Settings, Projects lists yours."))


def managed(session: Session, user: User, project_id: uuid.UUID) -> Project:
    """A project that this person manages. Raises NotFound where it is not seen, Forbidden where it is seen and not managed."""
    project, role = membership(session, user, project_id)
    _may_make(user)
    if role != "admin":
        message = gettext(_MANAGED_BY_OTHERS[role], project=project.name)
        raise Forbidden(message, hint=gettext("Ask one of them."), code="insufficient_permissions")
    return project


_MANAGED_BY_OTHERS = {
    "member": mark("You are a member of %(project)s; its admins manage it."),
    "viewer": mark("You are a viewer of %(project)s; its admins manage it."),
}
_MANAGED_BY_MEMBERS = {
    "viewer": mark("Projects are managed by members of the studio, and you are a viewer."),
    "guest": mark("Projects are managed by members of the studio, and you are a guest."),
}


# Making and members -----------------------------------------------------------------------------------------------------


def create(session: Session, user: User, name: str) -> Project:
    """A new project with its maker as its first admin. Raises Forbidden for a viewer of the studio."""
    _may_make(user)
    project = Project(id=uuid.uuid4(), name=_name(name))
    session.add(project)
    session.flush()
    session.add(ProjectMember(project_id=project.id, user_id=user.id, role="admin"))
    session.flush()
    session.refresh(project)
    return project


def _may_make(user: User) -> None:
    if user.role not in ("member", "admin"):
        raise Forbidden(
            gettext(_MANAGED_BY_MEMBERS[user.role]),
            hint=gettext("Ask an admin."),
            code="insufficient_permissions",
        )


def rename(session: Session, project: Project, name: str) -> None:
    project.name = _name(name)
    session.flush()


MIN_WEIGHT, MAX_WEIGHT = 0.01, 100.0


def set_weight(session: Session, project: Project, weight: float) -> None:
    """How much of the machine the work of a project may use beside others. Only an admin of the studio sets it."""
    if not MIN_WEIGHT <= weight <= MAX_WEIGHT:
        raise BadField(gettext("A weight is 0.01 to 100."), param="weight", hint=gettext("1 is usual; 2 counts half of what is used."))
    project.weight = weight
    session.flush()


def _name(name: str) -> str:
    clean = storable(name.strip())
    if not 1 <= len(clean) <= 80:
        raise BadField(gettext("A project's name has 1 to 80 characters."), param="name", hint=gettext("Shorten it."))
    return str(clean)


def members(session: Session, project: Project) -> list[tuple[ProjectMember, User]]:
    found = select(ProjectMember, User).join(User, ProjectMember.user_id == User.id).where(ProjectMember.project_id == project.id)
    return [(member, person) for member, person in session.execute(found.order_by(User.name))]


def member_of(session: Session, project: Project, person: User) -> ProjectMember:
    found = session.get(ProjectMember, (project.id, person.id))
    if found is None:
        message = gettext("%(name)s is no member of %(project)s.", name=person.name, project=project.name)
        raise NotFound(message, param="user_id", hint=gettext("Its page lists the members."))
    return found


def set_member(session: Session, project: Project, person: User, role: str) -> ProjectMember:
    """Add a person, or give a member another role. Raises Conflict for a personal project and for its last admin."""
    check_role(role)
    if project.personal:
        message = gettext("%(project)s is a project of one person.", project=project.name)
        raise Conflict(message, hint=gettext("Create a project for several."), code="personal_project")
    if person.disabled_at is not None:
        raise Conflict(gettext("%(name)s is disabled.", name=person.name), hint=gettext("Let the person in again first."))
    if role != "admin":
        _keep_an_admin(session, project, person)
    added = insert(ProjectMember).values(project_id=project.id, user_id=person.id, role=role)
    session.execute(added.on_conflict_do_update(index_elements=["project_id", "user_id"], set_={"role": role}))
    return session.get_one(ProjectMember, (project.id, person.id), populate_existing=True)


def remove_member(session: Session, project: Project, person: User) -> None:
    """What the person made stays in the project. Raises Conflict for the last admin and for a personal project."""
    member = member_of(session, project, person)
    if project.personal:
        message = gettext("%(project)s is %(name)s's own.", project=project.name, name=person.name)
        raise Conflict(message, hint=gettext("Hand it over where the person leaves."), code="personal_project")
    _keep_an_admin(session, project, person)
    session.delete(member)
    session.execute(update(BrowserSession).where(*_working_in(project, person)).values(project_id=None))
    session.flush()


def _working_in(project: Project, person: User) -> tuple[Any, ...]:
    return BrowserSession.project_id == project.id, BrowserSession.user_id == person.id


def _keep_an_admin(session: Session, project: Project, person: User) -> None:
    locked = select(ProjectMember.user_id).where(ProjectMember.project_id == project.id, ProjectMember.role == "admin")
    if set(session.scalars(locked.order_by(ProjectMember.user_id).with_for_update())) == {person.id}:
        message = gettext("%(name)s is the only admin of %(project)s.", name=person.name, project=project.name)
        raise Conflict(message, hint=gettext("Make somebody else its admin first."), code="last_admin")


def choose(session: Session, user: User, token_sha256: str, project_id: uuid.UUID) -> Project:
    """Work in this project from now on, in the browser of this session."""
    project = membership(session, user, project_id).project
    own = None if project.id == user.id else project.id
    session.execute(update(BrowserSession).where(BrowserSession.token_sha256 == token_sha256).values(project_id=own))
    return project


# Links for guests -------------------------------------------------------------------------------------------------------


def share(session: Session, user: User, project: Project) -> tuple[ShareLink, str]:
    """A link and its path, which cannot be shown again."""
    token = secrets.token_urlsafe(32)
    link = ShareLink(id=uuid.uuid4(), project_id=project.id, token_sha256=sha256(token), created_by=user.id)
    session.add(link)
    session.flush()
    return link, f"/shared/{token}"


def links(session: Session, project: Project) -> list[ShareLink]:
    found = select(ShareLink).where(ShareLink.project_id == project.id, ShareLink.revoked_at.is_(None))
    return list(session.scalars(found.order_by(ShareLink.created_at.desc())))


def take_back(session: Session, project: Project, link_id: uuid.UUID) -> None:
    """End a link, the sessions of its guests, and with them their streams."""
    gone = update(ShareLink).where(ShareLink.id == link_id, ShareLink.project_id == project.id)
    if not touched(session, gone.values(revoked_at=func.coalesce(ShareLink.revoked_at, func.clock_timestamp()))):
        raise NotFound(gettext("No such link."), hint=gettext("The project's page lists its links."))
    session.execute(delete(BrowserSession).where(BrowserSession.share_id == link_id))


def shared(session: Session, token: str) -> tuple[ShareLink, Project]:
    """The link in force with this token. Raises NotFound."""
    found = select(ShareLink, Project).join(Project, ShareLink.project_id == Project.id).join(User, ShareLink.created_by == User.id)
    found = found.where(ShareLink.token_sha256 == sha256(token), ShareLink.revoked_at.is_(None), User.disabled_at.is_(None))
    row = session.execute(found).one_or_none()
    if row is None:
        raise NotFound(gettext("This link shows nothing any more."), hint=gettext("Ask for a new one."), code="link_over")
    return row[0], row[1]


# Leaving ----------------------------------------------------------------------------------------------------------------


def hand_over(session: Session, leaver: User, heir: User) -> int:
    """Give everything of a person who leaves to another one, and disable the account; returns how many objects changed hands.

    In each project the heir becomes the owner of what the leaver made, and takes the leaver's place as a member. The leaver's own
    project becomes an ordinary one of the heir's.
    """
    if leaver.id == heir.id:
        raise BadField(gettext("Nobody hands over to themselves."), param="to", hint=gettext("Name another person."))
    if heir.disabled_at is not None:
        raise Conflict(gettext("%(name)s is disabled.", name=heir.name), hint=gettext("Name somebody who is here."), param="to")
    people.disable(session, leaver)
    moved = 0
    for table in owned_tables():
        values: dict[str, Any] = {"owner_id": heir.id}
        if table in (Job, Comparison):
            values["idempotency_key"] = None  # it is the leaver's, and the heir may have used the same
        moved += touched(session, update(table).where(table.owner_id == leaver.id).values(**values))
    for project, role in of_person(session, leaver.id):
        place = insert(ProjectMember).values(project_id=project.id, user_id=heir.id, role=role)
        if role == "admin":
            place = place.on_conflict_do_update(index_elements=["project_id", "user_id"], set_={"role": "admin"})
        session.execute(place if role == "admin" else place.on_conflict_do_nothing())
        if project.id == leaver.id:
            project.personal, project.name = False, f"Handed over by {leaver.name}"[:80]
    session.execute(delete(ProjectMember).where(ProjectMember.user_id == leaver.id))
    session.execute(update(ShareLink).where(ShareLink.created_by == leaver.id).values(created_by=heir.id))
    session.flush()
    return moved


def owned_tables() -> list[Any]:
    """Every table whose rows belong to a person in a project."""
    found = [mapper.class_ for mapper in Base.registry.mappers if {"owner_id", "project_id"} <= set(mapper.columns.keys())]
    return sorted(found, key=lambda table: table.__tablename__)


def left_for_good(session: Session, person: User) -> bool:
    """Whether a person's things were handed over: the account has no project of its own any more."""
    return session.get(ProjectMember, (person.id, person.id)) is None


def let_in_again(session: Session, person: User) -> None:
    """Raises Conflict where the person's things were handed over."""
    if left_for_good(session, person):
        raise Conflict(
            gettext("%(name)s has left, and somebody else owns what they made.", name=person.name),
            hint=gettext("Invite the person anew, under another name."),
        )
    people.enable(session, person)


def to_json(project: Project) -> dict[str, Any]:
    return {
        "object": "organization.project",
        "id": ids.public(ids.PROJECT, project.id),
        "name": project.name,
        "personal": project.personal,
        "weight": project.weight,
        "limits": limits.own_json(project.limits),
        "created_at": int(project.created_at.timestamp()),
    }


def member_json(member: ProjectMember, person: User) -> dict[str, Any]:
    return {
        "object": "organization.project.user",
        "id": ids.public(ids.USER, person.id),
        "name": person.name,
        "role": member.role,
        "added_at": int(member.created_at.timestamp()),
    }
