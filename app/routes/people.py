"""The people of the studio: a page and `/v1/organization` for admins, and the page of an invitation."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Form, Request, Response
from fastapi.responses import RedirectResponse
from starlette.concurrency import run_in_threadpool

from app import limits, schemas
from app.db import Db, transaction
from app.errors import StudioError
from app.kit import ids
from app.languages import gettext, mark
from app.schemas.openapi import answers
from app.settings import get_settings
from app.tables import Invitation, User
from app.web import auth, passwords, people, projects
from app.web.auth import CurrentUser
from app.web.pagination import After, Limit, page
from app.web.policy import ROLES
from app.web.templates import flash, public_address, render

api = APIRouter(prefix="/v1/organization")
pages = APIRouter()
Json = dict[str, Any]
PAGE = "/settings/people"
NOW_IS = {
    "admin": mark("%(name)s is an admin from now on."),
    "member": mark("%(name)s is a member from now on."),
    "viewer": mark("%(name)s is a viewer from now on."),
}


# The API ----------------------------------------------------------------------------------------------------------------


@api.get("/users", operation_id="list_people", responses=answers(schemas.page_of(schemas.Person)))
def list_people(session: Db, user: CurrentUser, after: After = None, limit: Limit = 20) -> Json:
    """Everybody with an account, newest first. Admins only, as all of this."""
    return page(people.query(), after, limit, "desc", people.to_json, session=session, key=ids.parse_user)


@api.get("/users/{user_id}", operation_id="retrieve_person", responses=answers(schemas.Person))
def retrieve_person(session: Db, user: CurrentUser, user_id: str) -> Json:
    """One person, with what they use of what is limited."""
    person = people.get(session, ids.parse_user(user_id))
    return people.to_json(person) | {"usage": limits.usage_json(session, "person", person.id)}


@api.post("/users/{user_id}", operation_id="update_person", responses=answers(schemas.Person, 409))
def update_person(session: Db, user: CurrentUser, user_id: str, change: schemas.ChangePerson) -> Json:
    """Change a person's role or limits, or disable the account. The last admin stays one."""
    person = people.get(session, ids.parse_user(user_id))
    if change.role is not None:
        people.set_role(session, person, change.role)
    if change.disabled is not None:
        people.disable(session, person) if change.disabled else projects.let_in_again(session, person)
    if change.hand_over_to is not None:
        projects.hand_over(session, person, people.get(session, ids.parse_user(change.hand_over_to)))
    if change.limits is not None:
        limits.set_own(person, change.limits.model_dump(exclude_unset=True))
    session.flush()
    session.refresh(person)
    return people.to_json(person)


@api.get("/invites", operation_id="list_invites", responses=answers(schemas.page_of(schemas.Invite)))
def list_invites(session: Db, user: CurrentUser, after: After = None, limit: Limit = 20) -> Json:
    """Invitations, newest first."""
    return page(people.invitations(), after, limit, "desc", people.invitation_json, session=session, key=ids.parse_invitation)


@api.post("/invites", operation_id="create_invite", responses=answers(schemas.Invite))
def create_invite(request: Request, session: Db, user: CurrentUser, order: schemas.CreateInvite) -> Json:
    """Make a link with which one person makes an account. `url` is shown only this once."""
    made, path = people.invite(session, user, order.role, order.note, order.days)
    return people.invitation_json(made, f"{public_address(request)}{path}")


@api.get("/invites/{invite_id}", operation_id="retrieve_invite", responses=answers(schemas.Invite))
def retrieve_invite(session: Db, user: CurrentUser, invite_id: str) -> Json:
    """One invitation."""
    return people.invitation_json(people.get_invitation(session, ids.parse_invitation(invite_id)))


@api.delete("/invites/{invite_id}", operation_id="delete_invite", responses=answers(schemas.Deleted, 409))
def delete_invite(session: Db, user: CurrentUser, invite_id: str) -> Json:
    """Take an invitation back: its link makes no account any more."""
    people.revoke(session, people.get_invitation(session, ids.parse_invitation(invite_id)))
    return {"id": invite_id, "object": "organization.invite", "deleted": True}


# The page ---------------------------------------------------------------------------------------------------------------


@pages.get(PAGE)
def show(request: Request, user: CurrentUser, session: Db) -> Response:
    return _page(request, session)


def _page(request: Request, session: Db, link: str | None = None) -> Response:
    found = people.open_invitations(session)
    values: dict[str, Any] = {
        "people": people.list_(session),
        "last_used": people.last_used(session),
        "two_step": people.with_two_step(session),
        "left": {one.id for one in people.list_(session) if one.disabled_at and projects.left_for_good(session, one)},
        "invitations": [(one, session.get_one(User, one.invited_by).name) for one in found],
        "link": link,
        "roles": ROLES,
    }
    return render(request, "people.html", **values)


@pages.post(f"{PAGE}/invitations")
def invite(
    request: Request,
    user: CurrentUser,
    session: Db,
    role: Annotated[str, Form(max_length=20)] = "member",
    note: Annotated[str, Form(max_length=200)] = "",
) -> Response:
    """The response is the page itself, because the link is shown once and stored nowhere, not even for a redirect."""
    _, path = people.invite(session, user, role, note)
    return _page(request, session, f"{public_address(request)}{path}")


@pages.post(f"{PAGE}/invitations/{{invitation_id}}/revoke")
def revoke(request: Request, user: CurrentUser, session: Db, invitation_id: str) -> Response:
    people.revoke(session, people.get_invitation(session, ids.parse_invitation(invitation_id)))
    flash(request, gettext("The invitation is revoked: its link makes no account any more."))
    return RedirectResponse(PAGE, 303)


@pages.post(f"{PAGE}/{{user_id}}/role")
def set_role(request: Request, user: CurrentUser, session: Db, user_id: str, role: Annotated[str, Form(max_length=20)] = "") -> Response:
    person = people.get(session, ids.parse_user(user_id))
    people.set_role(session, person, role)
    flash(request, gettext(NOW_IS[role], name=person.name))
    return RedirectResponse(PAGE, 303)


@pages.post(f"{PAGE}/{{user_id}}/disable")
def disable(request: Request, user: CurrentUser, session: Db, user_id: str) -> Response:
    person = people.get(session, ids.parse_user(user_id))
    people.disable(session, person)
    flash(request, gettext("%(name)s is signed out everywhere and cannot sign in any more. What they made stays.", name=person.name))
    return RedirectResponse(PAGE, 303)


@pages.post(f"{PAGE}/{{user_id}}/enable")
def enable(request: Request, user: CurrentUser, session: Db, user_id: str) -> Response:
    person = people.get(session, ids.parse_user(user_id))
    projects.let_in_again(session, person)
    flash(request, gettext("%(name)s may sign in again. Keys that were revoked stay revoked.", name=person.name))
    return RedirectResponse(PAGE, 303)


@pages.post(f"{PAGE}/{{user_id}}/hand-over")
def hand_over(request: Request, user: CurrentUser, session: Db, user_id: str, to: Annotated[str, Form(max_length=80)] = "") -> Response:
    person, heir = people.get(session, ids.parse_user(user_id)), people.get(session, ids.parse_user(to))
    moved = projects.hand_over(session, person, heir)
    told = {"name": person.name, "heir": heir.name, "num": moved}
    flash(request, gettext("%(name)s has left: %(heir)s owns what they made (%(num)s objects).", **told))
    return RedirectResponse(PAGE, 303)


# An invitation, opened by whom it is for ------------------------------------------------------------------------------------


@pages.get("/invitation/{token}")
def open_invitation(request: Request, token: str, session: Db) -> Response:
    return _form(request, token, people.invited(session, token))


def _form(request: Request, token: str, invitation: Invitation, fault: StudioError | None = None, name: str = "") -> Response:
    settings = get_settings()
    provider = settings.oidc_name if settings.oidc_issuer else ""
    values = {
        "role": invitation.role, "fault": fault, "name": name, "min_length": passwords.MIN_LENGTH, "token": token, "provider": provider
    }  # fmt: skip
    return render(request, "invitation.html", status_code=fault.status if fault else 200, **values)


@pages.post("/invitation/{token}")
async def accept_invitation(
    request: Request, token: str, name: Annotated[str, Form()] = "", password: Annotated[str, Form()] = ""
) -> Response:
    invitation = await run_in_threadpool(_invited, token)
    try:
        made = await passwords.new_hash(password)
        return await run_in_threadpool(_let_in, request, token, name[:200], made)
    except StudioError as fault:
        return await run_in_threadpool(_form, request, token, invitation, fault, name[:80])


def _invited(token: str) -> Invitation:
    with transaction() as session:
        return people.invited(session, token)


def _let_in(request: Request, token: str, name: str, password_hash: str) -> Response:
    response = RedirectResponse("/", 303)
    with transaction() as session:
        auth.open_session(session, request, response, people.accept(session, token, name, password_hash))
    return response
