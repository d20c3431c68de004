"""Projects: pages for their members, `/v1/organization/projects` for admins, and the page of a link that shows one to guests."""

from __future__ import annotations

import uuid
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Form, Request, Response
from fastapi.responses import RedirectResponse
from sqlalchemy import func

from app import limits, schemas
from app.db import Db
from app.errors import Forbidden, NotFound
from app.kit import ids
from app.languages import gettext, mark
from app.routes.accounts import safe_next
from app.schemas.openapi import answers
from app.tables import User
from app.web import auth, people, project_deletion, projects
from app.web.auth import CurrentUser
from app.web.pagination import After, Limit, page
from app.web.policy import ROLES
from app.web.templates import flash, public_address, render

api = APIRouter(prefix="/v1/organization/projects")
pages = APIRouter()
Json = dict[str, Any]
PAGE = "/settings/projects"
NOW_IS = {
    "admin": mark("%(name)s is an admin of %(project)s."),
    "member": mark("%(name)s is a member of %(project)s."),
    "viewer": mark("%(name)s is a viewer of %(project)s."),
}


# The API ----------------------------------------------------------------------------------------------------------------


@api.get("", operation_id="list_projects", responses=answers(schemas.page_of(schemas.Project)))
def list_projects(session: Db, user: CurrentUser, after: After = None, limit: Limit = 20) -> Json:
    """Every project, newest first: what it is called and who is in it, and nothing of what it holds. Admins only, as all of this."""
    return page(projects.query(), after, limit, "desc", projects.to_json, session=session, key=ids.parse_project)


@api.post("", operation_id="create_project", responses=answers(schemas.Project))
def create_project(session: Db, user: CurrentUser, order: schemas.NameProject) -> Json:
    """Create a project. You become its first admin. Requests name it in the header `OpenAI-Project`."""
    return projects.to_json(projects.create(session, user, order.name))


@api.get("/{project_id}", operation_id="retrieve_project", responses=answers(schemas.Project))
def retrieve_project(session: Db, user: CurrentUser, project_id: str) -> Json:
    """One project, with what it uses of what is limited."""
    project = projects.get(session, ids.parse_project(project_id))
    return projects.to_json(project) | {"usage": limits.usage_json(session, "project", project.id)}


@api.post("/{project_id}", operation_id="update_project", responses=answers(schemas.Project))
def update_project(session: Db, user: CurrentUser, project_id: str, order: schemas.ChangeProject) -> Json:
    """Rename a project, give it another weight in the queue, or limit what it uses."""
    project = projects.get(session, ids.parse_project(project_id))
    if order.name is not None:
        projects.rename(session, project, order.name)
    if order.weight is not None:
        projects.set_weight(session, project, order.weight)
    if order.limits is not None:
        limits.set_own(project, order.limits.model_dump(exclude_unset=True))
        session.flush()
    return projects.to_json(project)


@api.get("/{project_id}/contents", operation_id="retrieve_project_contents", responses=answers(schemas.ProjectContents))
def retrieve_contents(session: Db, user: CurrentUser, project_id: str) -> Json:
    """What is in a project, as numbers: what its deletion would move or delete."""
    found = project_deletion.contents(session, projects.get(session, ids.parse_project(project_id)))
    return {"object": "organization.project.contents", "counts": found.counts, "bytes": found.bytes}


@api.delete("/{project_id}", operation_id="delete_project", responses=answers(schemas.Deleted, 409))
def delete_project(
    session: Db, user: CurrentUser, project_id: str, move_to: str | None = None, contents: Literal["refuse", "delete"] = "refuse"
) -> Json:
    """Delete a project. What is in it goes to the project `move_to`, or is deleted too with `contents=delete`; without either only
    an empty project is deleted. A person's own project stays."""
    to = projects.get(session, ids.parse(ids.PROJECT, move_to, param="move_to")) if move_to else None
    project = projects.get(session, ids.parse_project(project_id))
    project_deletion.remove(session, project, move_to=to, with_contents=contents == "delete")
    return {"id": project_id, "object": "organization.project", "deleted": True}


@api.get("/{project_id}/users", operation_id="list_project_members", responses=answers(schemas.list_of(schemas.ProjectMember)))
def list_members(session: Db, user: CurrentUser, project_id: str) -> Json:
    """The members of a project, by name."""
    found = projects.members(session, projects.get(session, ids.parse_project(project_id)))
    return {"object": "list", "data": [projects.member_json(*one) for one in found], "has_more": False}


@api.post("/{project_id}/users", operation_id="create_project_member", responses=answers(schemas.ProjectMember, 409))
def add_member(session: Db, user: CurrentUser, project_id: str, order: schemas.AddMember) -> Json:
    """Make a person a member of a project."""
    project, person = _both(session, project_id, order.user_id)
    return projects.member_json(projects.set_member(session, project, person, order.role), person)


@api.get("/{project_id}/users/{user_id}", operation_id="retrieve_project_member", responses=answers(schemas.ProjectMember))
def retrieve_member(session: Db, user: CurrentUser, project_id: str, user_id: str) -> Json:
    """One member of a project."""
    project, person = _both(session, project_id, user_id)
    return projects.member_json(projects.member_of(session, project, person), person)


@api.post("/{project_id}/users/{user_id}", operation_id="update_project_member", responses=answers(schemas.ProjectMember, 409))
def update_member(session: Db, user: CurrentUser, project_id: str, user_id: str, order: schemas.ChangeMember) -> Json:
    """Change the role of a member in a project. The last admin of a project stays one."""
    project, person = _both(session, project_id, user_id)
    projects.member_of(session, project, person)
    return projects.member_json(projects.set_member(session, project, person, order.role), person)


@api.delete("/{project_id}/users/{user_id}", operation_id="delete_project_member", responses=answers(schemas.Deleted, 409))
def delete_member(session: Db, user: CurrentUser, project_id: str, user_id: str) -> Json:
    """Remove a person from a project. What the person made stays there."""
    projects.remove_member(session, *_both(session, project_id, user_id))
    return {"id": user_id, "object": "organization.project.user", "deleted": True}


def _both(session: Db, project_id: str, user_id: str) -> tuple[Any, User]:
    return projects.get(session, ids.parse_project(project_id)), people.get(session, ids.parse_user(user_id))


# Pages ------------------------------------------------------------------------------------------------------------------


@pages.post("/project")
def choose(
    request: Request, user: CurrentUser, session: Db, project: Annotated[str, Form(max_length=80)], next: Annotated[str, Form()] = "/"
) -> Response:
    """Work in another project from now on, in this browser."""
    held: auth.Pass = request.state.pass_
    projects.choose(session, user, held.token_sha256 or "", ids.parse_project(project))
    return RedirectResponse(safe_next(next), 303)


@pages.get(PAGE)
def list_page(request: Request, user: CurrentUser, session: Db) -> Response:
    return render(request, "projects.html", memberships=projects.of_person(session, user.id))


@pages.post(PAGE)
def create(request: Request, user: CurrentUser, session: Db, name: Annotated[str, Form(max_length=200)] = "") -> Response:
    made = projects.create(session, user, name)
    flash(request, gettext("The project %(project)s is created. Switch to it to work in it.", project=made.name))
    return RedirectResponse(_address(made.id), 303)


def _address(project_id: uuid.UUID) -> str:
    return f"{PAGE}/{ids.public(ids.PROJECT, project_id)}"


@pages.get(f"{PAGE}/{{project_id}}")
def show(request: Request, user: CurrentUser, session: Db, project_id: str) -> Response:
    return _page(request, user, session, project_id)


def _page(request: Request, user: User, session: Db, project_id: str, link: str | None = None) -> Response:
    project, role = projects.membership(session, user, ids.parse_project(project_id))
    values: dict[str, Any] = {
        "project": project,
        "role": role if user.role != "viewer" else "viewer",  # the role in the studio bounds it
        "address": _address(project.id),
        "public_id": ids.public(ids.PROJECT, project.id),
        "members": projects.members(session, project),
        "guest_links": projects.links(session, project) if role == "admin" else [],
        "link": link,
        "roles": ROLES,
        "contents": project_deletion.contents(session, project) if role == "admin" else None,
        "others": [one.project for one in projects.of_person(session, user.id) if one.project.id != project.id and one.role != "viewer"],
    }
    return render(request, "project.html", **values)


@pages.post(f"{PAGE}/{{project_id}}/name")
def rename(request: Request, user: CurrentUser, session: Db, project_id: str, name: Annotated[str, Form(max_length=200)] = "") -> Response:
    project = projects.managed(session, user, ids.parse_project(project_id))
    projects.rename(session, project, name)
    return RedirectResponse(_address(project.id), 303)


@pages.post(f"{PAGE}/{{project_id}}/delete")
def delete(
    request: Request, user: CurrentUser, session: Db, project_id: str, contents: Annotated[str, Form(max_length=80)] = ""
) -> Response:
    """Delete a project. `contents` is the project that gets what is in it, or `delete`."""
    project = projects.managed(session, user, ids.parse_project(project_id))
    to = projects.membership(session, user, ids.parse_project(contents)) if contents not in ("", "delete") else None
    if to is not None and to.role == "viewer":
        message = gettext("You are a viewer of %(project)s.", project=to.project.name)
        raise Forbidden(message, hint=gettext("Choose a project that you work in."))
    found = project_deletion.remove(session, project, move_to=to.project if to else None, with_contents=contents == "delete")
    said = gettext("The project %(project)s is deleted.", project=project.name)
    if to and found:
        said += " " + gettext("What was in it is in %(project)s now: %(contents)s.", project=to.project.name, contents=found.in_words())
    flash(request, said)
    return RedirectResponse(PAGE, 303)


@pages.post(f"{PAGE}/{{project_id}}/members")
def set_member(
    request: Request,
    user: CurrentUser,
    session: Db,
    project_id: str,
    name: Annotated[str, Form(max_length=80)] = "",
    role: Annotated[str, Form(max_length=20)] = "member",
) -> Response:
    """Add a person by name, or give a member another role."""
    project = projects.managed(session, user, ids.parse_project(project_id))
    person = people.named(session, name.strip())
    projects.set_member(session, project, person, role)
    flash(request, gettext(NOW_IS[role], name=person.name, project=project.name))
    return RedirectResponse(_address(project.id), 303)


@pages.post(f"{PAGE}/{{project_id}}/members/{{user_id}}/remove")
def remove_member(request: Request, user: CurrentUser, session: Db, project_id: str, user_id: str) -> Response:
    """Remove a member; everybody may leave."""
    key, person_id = ids.parse_project(project_id), ids.parse_user(user_id)
    found = projects.membership(session, user, key).project if person_id == user.id else projects.managed(session, user, key)
    person = people.get(session, person_id)
    projects.remove_member(session, found, person)
    told = {"name": person.name, "project": found.name}
    flash(request, gettext("%(name)s is no member of %(project)s any more. What they made stays there.", **told))
    return RedirectResponse(PAGE if person_id == user.id else _address(key), 303)


@pages.post(f"{PAGE}/{{project_id}}/links")
def share(request: Request, user: CurrentUser, session: Db, project_id: str) -> Response:
    """The response is the page itself, because the link is shown once and stored nowhere, not even for a redirect."""
    project = projects.managed(session, user, ids.parse_project(project_id))
    _, path = projects.share(session, user, project)
    return _page(request, user, session, project_id, f"{public_address(request)}{path}")


@pages.post(f"{PAGE}/{{project_id}}/links/{{link_id}}/revoke")
def take_back(request: Request, user: CurrentUser, session: Db, project_id: str, link_id: str) -> Response:
    project = projects.managed(session, user, ids.parse_project(project_id))
    try:
        key = uuid.UUID(link_id)
    except ValueError:
        raise NotFound(gettext("No such link.")) from None
    projects.take_back(session, project, key)
    flash(request, gettext("The link shows nothing any more, and its guests are signed out."))
    return RedirectResponse(_address(project.id), 303)


# A link, opened by a guest ------------------------------------------------------------------------------------------------


@pages.get("/shared/{token}")
def open_link(request: Request, token: str, session: Db) -> Response:
    _, project = projects.shared(session, token)
    return render(request, "shared.html", project=project, signed_in=auth.identify(request) is not None)


@pages.post("/shared/{token}")
def enter(request: Request, token: str, session: Db) -> Response:
    """Look at the project as a guest, in a session of its own."""
    link, _ = projects.shared(session, token)
    link.last_used_at = func.clock_timestamp()
    response = RedirectResponse("/", 303)
    auth.open_session(session, request, response, people.get(session, link.created_by), link)
    return response
