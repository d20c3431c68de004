"""Projects: members, the current one, the headers of the API, links for guests, and a person who leaves."""

from __future__ import annotations

import re

import pytest
from sqlalchemy import func, select
from starlette.testclient import TestClient

from app.errors import Conflict, Forbidden, NotFound
from app.jobs import service as jobs
from app.kit import ids
from app.models import aliases
from app.models import service as models
from app.ownership import maker_of, owned
from app.prompts import service as prompts
from app.tables import BrowserSession, Dataset, Model, Project, Prompt, ShareLink, User
from app.web import auth, people, projects
from tests.conftest import ORIGIN, csrf_token
from tests.factories import make_dataset, make_job
from tests.web.test_people import browser, made, signed_in


@pytest.fixture
def ada(session) -> User:
    return made(session, "Ada", "member")


@pytest.fixture
def team(session, user, ada) -> Project:
    """A project of the owner's, with Ada as a member."""
    project = projects.create(session, user, "Violins")
    projects.set_member(session, project, ada, "member")
    session.commit()
    return project


def program(web, session, person: User, **more) -> TestClient:
    _, text = auth.create_key(session, person, "a program", **more)
    session.commit()
    return TestClient(web.app, base_url=ORIGIN, headers={"authorization": f"Bearer {text}"})


def within(project: Project) -> dict[str, str]:
    return {"openai-project": ids.public(ids.PROJECT, project.id)}


def within_team(person: User, project: Project) -> User:
    return User(id=person.id, name=person.name, role=person.role).work_in(project.id)


def a_prompt(session, person: User, name: str) -> Prompt:
    made = prompts.create(session, person, name, prompts.read_body({}))[0]
    session.commit()
    return made


FILE = {"files": {"file": ("a.jsonl", b'{"prompt": "a", "completion": "b"}\n')}, "data": {"purpose": "user_data"}}


# Who is in it ---------------------------------------------------------------------------------------------------------


def test_everybody_has_a_project_and_nobody_else_is_in_it(session, user, ada):
    for person in (user, ada):
        (own,) = projects.of_person(session, person.id)
        assert own.project.id == person.id and own.project.personal and own.role == "admin"
    with pytest.raises(Conflict):
        projects.set_member(session, projects.get(session, user.id), ada, "viewer")
    with pytest.raises(NotFound):
        projects.membership(session, ada, user.id)


def test_members_from_the_page(web, client, session, user, ada):
    address = client.post("/settings/projects", data={"name": "Violins"}, follow_redirects=False).headers["location"]
    assert client.post(f"{address}/members", data={"name": "Ada", "role": "viewer"}).status_code == 200
    asker = signed_in(web, session, ada)
    assert "Violins" in asker.get("/settings/projects").text and asker.get(address).status_code == 200
    for path, data in (("name", {"name": "x"}), ("members", {"name": "Ada", "role": "admin"}), ("links", {})):
        assert asker.post(f"{address}/{path}", data=data).status_code == 403, "a viewer manages nothing"
    stranger = signed_in(web, session, made(session, "Bo", "member"))
    assert stranger.get(address).status_code == 404 and stranger.post(f"{address}/links").status_code == 404
    assert client.post(f"{address}/members/{ids.public(ids.USER, user.id)}/remove").status_code == 409, "the last admin"
    assert asker.post(f"{address}/members/{ids.public(ids.USER, ada.id)}/remove").status_code == 200, "everybody may leave"
    assert asker.get(address).status_code == 404


def test_members_by_the_api(api, session, ada):
    project = api.post("/v1/organization/projects", json={"name": "Violins"}).json()
    path, key = f"/v1/organization/projects/{project['id']}", ids.public(ids.USER, ada.id)
    assert api.post(path, json={"name": "Cellos"}).json()["name"] == "Cellos" == api.get(path).json()["name"]
    assert api.post(f"{path}/users", json={"user_id": key, "role": "viewer"}).json()["role"] == "viewer"
    assert api.post(f"{path}/users/{key}", json={"role": "admin"}).json()["role"] == "admin"
    assert [one["name"] for one in api.get(f"{path}/users").json()["data"]] == ["Ada", "owner"]
    assert api.get(f"{path}/users/{key}").json()["id"] == key
    assert api.delete(f"{path}/users/{key}").json()["deleted"] is True
    assert api.get(f"{path}/users/{key}").status_code == 404 and api.post(f"{path}/users/{key}", json={"role": "admin"}).status_code == 404
    listed = {one["id"]: one for one in api.get("/v1/organization/projects").json()["data"]}
    assert len(listed) == 3 and sum(one["personal"] for one in listed.values()) == 2
    assert api.post(f"/v1/organization/projects/{ids.public(ids.PROJECT, ada.id)}/users", json={"user_id": key}).status_code == 409


# The current project ----------------------------------------------------------------------------------------------------


def test_what_one_member_makes_the_other_sees_there_and_nowhere_else(web, session, user, ada, team):
    asker, other = program(web, session, user), program(web, session, ada)
    key = asker.post("/v1/files", headers=within(team), **FILE).json()["id"]
    assert [one["id"] for one in other.get("/v1/files", headers=within(team)).json()["data"]] == [key]
    assert other.get(f"/v1/files/{key}", headers=within(team)).status_code == 200
    for elsewhere in (other, asker):
        assert elsewhere.get("/v1/files").json()["data"] == []
        missed = elsewhere.get(f"/v1/files/{key}")
        assert missed.status_code == 404 and "It is in your project Violins" in missed.json()["error"]["message"]
    stranger = program(web, session, made(session, "Bo", "admin")).get(f"/v1/files/{key}")
    assert stranger.status_code == 404 and "Violins" not in stranger.text, "an admin of the studio is told no more than others"
    assert other.delete(f"/v1/files/{key}", headers=within(team)).status_code == 200, "a member changes what is there"


def test_the_browser_works_in_the_project_chosen_in_the_sidebar(web, session, user, ada, team):
    prompt = a_prompt(session, within_team(user, team), "Ask for varnish")
    asker = signed_in(web, session, ada)
    page, address = asker.get("/playground/prompts").text, f"/playground/prompts/{ids.public(ids.PROMPT, prompt.id)}"
    assert "Ask for varnish" not in page and asker.get(address).status_code == 404
    assert re.search(r'<option value="proj_[0-9a-f]{32}" selected>Ada</option>', page)
    chosen = {"project": ids.public(ids.PROJECT, team.id), "next": "/playground/prompts"}
    assert "Ask for varnish" in asker.post("/project", data=chosen).text
    assert asker.get(address).status_code == 200 and ">Violins</option>" in asker.get("/").text
    elsewhere = signed_in(web, session, ada)
    assert elsewhere.get(address).status_code == 404, "another browser works where it did"
    assert asker.post("/project", data={"project": ids.public(ids.PROJECT, user.id)}).status_code == 404
    projects.remove_member(session, team, ada)
    session.commit()
    assert asker.get(address).status_code == 404 and asker.get("/jobs").status_code == 200


def test_headers_that_name_nothing_of_ones_own_are_refused(web, session, user, ada, team):
    stranger = program(web, session, made(session, "Bo", "admin"))
    for name in (ids.public(ids.PROJECT, team.id), ids.public(ids.PROJECT, user.id), "proj_" + "0" * 32, "violins"):
        refused = stranger.get("/v1/files", headers={"openai-project": name})
        assert refused.status_code == 403 and refused.json()["error"]["code"] == "mismatched_project", name
    assert stranger.get("/v1/files", headers={"openai-organization": "org-other"}).json()["error"]["code"] == "mismatched_organization"
    assert stranger.get("/v1/files", headers={"openai-organization": "org-luthier"}).status_code == 200


def test_a_key_of_one_project_reaches_no_other(web, session, user, ada, team):
    asker = program(web, session, ada, project_id=team.id)
    key = asker.post("/v1/files", **FILE).json()["id"]
    assert program(web, session, user).get(f"/v1/files/{key}", headers=within(team)).status_code == 200
    assert asker.get("/v1/files", headers=within(team)).status_code == 200
    assert asker.get("/v1/files", headers=within(projects.get(session, ada.id))).status_code == 403
    projects.remove_member(session, team, ada)
    session.commit()
    assert asker.get("/v1/files").status_code == 403


def test_the_openai_client_names_the_project(openai_client, api, session, user, team):
    client = openai_client.with_options(organization="org-luthier", project=ids.public(ids.PROJECT, team.id))
    client.files.create(file=("a.jsonl", b'{"prompt": "a", "completion": "b"}\n'), purpose="user_data")
    assert len(client.files.list().data) == 1 and api.get("/v1/files").json()["data"] == []


def test_a_viewer_of_a_project_looks_and_changes_nothing(web, session, user, ada, team):
    projects.set_member(session, team, ada, "viewer")
    session.commit()
    page = signed_in(web, session, ada)
    assert "looks-only" not in page.get("/datasets").text, "in a project of one's own"
    page.post("/project", data={"project": ids.public(ids.PROJECT, team.id)})
    assert '<body class="looks-only">' in page.get("/datasets").text and "looks-only" not in page.get("/settings/account").text
    asker = program(web, session, ada)
    refused = asker.post("/v1/files", headers=within(team), **FILE)
    assert refused.status_code == 403 and "your role in it is viewer" in refused.json()["error"]["message"]
    assert asker.get("/v1/files", headers=within(team)).status_code == 200 and asker.post("/v1/files", **FILE).status_code == 200


def test_who_is_removed_hears_no_more_of_it(session, user, ada, team):
    key, _ = auth.create_key(session, ada, "a program")
    there, own = auth.Pass(key_id=key.id, project_id=team.id), auth.Pass(key_id=key.id, project_id=ada.id)
    assert auth.still_good(session, [there, own]) == {there, own}
    projects.remove_member(session, team, ada)
    assert auth.still_good(session, [there, own]) == {own}


# Names ------------------------------------------------------------------------------------------------------------------


def test_names_of_models_and_aliases_are_a_projects_own(session, user, team, tiny_registered):
    own, there = user, within_team(user, team)
    made = [
        Model(owner_id=user.id, project_id=place, name="violin", title="Violin", kind="generic", path="x") for place in (user.id, team.id)
    ]
    session.add_all(made)
    session.flush()
    assert [models.get(session, one, "violin").id for one in (own, there)] == [one.id for one in made]
    aliases.set_(session, own, "favorite", "tiny")
    with pytest.raises(NotFound):
        aliases.remove(session, there, "favorite")
    aliases.set_(session, there, "favorite", "tiny")
    assert len(aliases.list_(session, own)) == len(aliases.list_(session, there)) == 1
    with pytest.raises(Conflict):
        aliases.set_(session, own, "violin", "tiny")


def test_what_is_done_for_a_job_later_stays_in_its_project(session, user, team, data_dir, tiny_registered):
    there = within_team(user, team)
    job = make_job(session, there, tiny_registered, make_dataset(session, there, data_dir))
    session.commit()
    assert job.project_id == team.id == maker_of(session, job).project_id and user.project_id == user.id
    assert [one.id for one in jobs.list_(session, there)] == [job.id] and jobs.list_(session, user) == []


# Links ------------------------------------------------------------------------------------------------------------------


def test_a_link_shows_the_project_until_it_is_taken_back(web, client, session, user, team):
    prompt, other = a_prompt(session, within_team(user, team), "Ask for varnish"), a_prompt(session, user, "Private")
    address = f"/settings/projects/{ids.public(ids.PROJECT, team.id)}"
    path = re.search(r'id="share-link">http://127.0.0.1:8000(/shared/[\w-]+)<', client.post(f"{address}/links").text)[1]
    token = path.rpartition("/")[2]
    assert token not in client.get(address).text and token not in str(session.scalars(select(ShareLink)).one().__dict__)
    guest = browser(web)
    assert "Violins" in guest.get(path).text and guest.get("/jobs", follow_redirects=False).status_code == 303, "to open it signs nobody in"
    assert guest.post(path, follow_redirects=False).status_code == 303
    page = guest.get("/playground/prompts").text
    assert "Ask for varnish" in page and "Private" not in page and "guest" in page and 'href="/settings"' not in page
    guest.headers["x-csrf-token"] = csrf_token(page)
    shown, hidden = (f"/playground/prompts/{ids.public(ids.PROMPT, one.id)}" for one in (prompt, other))
    assert guest.get(shown).status_code == 200 and guest.get(hidden).status_code == 404
    refused = guest.post(f"{shown}/delete")
    assert refused.status_code == 403 and "your role is guest" in refused.text
    for inside in ("/settings", "/settings/account", "/settings/projects", address, "/settings/people"):
        assert guest.get(inside).status_code == 403, inside
    assert "guest" not in client.get("/settings/account").text, "guests are no sessions of whoever made the link"
    link = session.scalars(select(ShareLink)).one()
    assert client.post(f"{address}/links/{link.id}/revoke", follow_redirects=False).status_code == 303
    assert guest.get(shown, follow_redirects=False).status_code == 303 and browser(web).get(path).status_code == 404
    assert client.get("/jobs").status_code == 200


def test_a_guests_stream_ends_with_the_link(web, session, user, team):
    link, path = projects.share(session, user, team)
    session.commit()
    assert browser(web).post(path, follow_redirects=False).status_code == 303
    held = auth.Pass(token_sha256=session.scalars(select(BrowserSession.token_sha256)).one(), project_id=team.id)
    assert auth.still_good(session, [held]) == {held}
    projects.take_back(session, team, link.id)
    assert auth.still_good(session, [held]) == set()


# Leaving ----------------------------------------------------------------------------------------------------------------


def test_a_person_who_leaves_hands_over_everything(web, client, session, user, ada, team):
    own = Prompt(owner_id=ada.id, name="Her own")
    shared = Dataset(owner_id=ada.id, project_id=team.id, name="Ours", status="ready")
    session.add_all([own, shared])
    session.commit()
    asker = signed_in(web, session, ada)
    done = client.post(f"/settings/people/{ids.public(ids.USER, ada.id)}/hand-over", data={"to": ids.public(ids.USER, user.id)})
    assert done.status_code == 200 and "2 objects" in done.text and "handed over" in done.text
    assert asker.get("/jobs", follow_redirects=False).status_code == 303
    session.expire_all()
    assert own.owner_id == shared.owner_id == user.id and own.project_id == ada.id
    for table in projects.owned_tables():
        assert session.scalar(select(func.count()).where(table.owner_id == ada.id)) == 0
    names = {one.project.name: one for one in projects.of_person(session, user.id)}
    assert set(names) == {"owner", "Violins", "Handed over by Ada"} and not names["Handed over by Ada"].project.personal
    heir = User(id=user.id, name=user.name, role=user.role).work_in(ada.id)
    assert owned(session, Prompt, heir, own.id).name == "Her own"
    assert client.post(f"/settings/people/{ids.public(ids.USER, ada.id)}/enable").status_code == 409


def test_handing_over_needs_somebody_else_who_is_here(api, session, user, ada):
    bo = made(session, "Bo", "member")
    people.disable(session, bo)
    session.commit()
    for leaver, heir, status in ((ada, ada, 400), (ada, bo, 409), (user, ada, 409)):
        path, to = f"/v1/organization/users/{ids.public(ids.USER, leaver.id)}", ids.public(ids.USER, heir.id)
        assert api.post(path, json={"hand_over_to": to}).status_code == status
    done = api.post(f"/v1/organization/users/{ids.public(ids.USER, ada.id)}", json={"hand_over_to": ids.public(ids.USER, user.id)})
    assert done.json()["disabled"] is True


def test_managing_is_for_its_admins(session, user, ada, team):
    assert projects.managed(session, user, team.id).id == team.id
    with pytest.raises(Forbidden):
        projects.managed(session, ada, team.id)
    with pytest.raises(NotFound):
        projects.managed(session, ada, user.id)


def test_a_viewer_of_the_studio_manages_no_project(web, session, user, ada, team):
    projects.set_member(session, team, ada, "admin")
    people.set_role(session, ada, "viewer")
    session.commit()
    asker, address = signed_in(web, session, ada), f"/settings/projects/{ids.public(ids.PROJECT, team.id)}"
    for path, data in ((f"{address}/links", {}), (f"{address}/name", {"name": "x"}), ("/settings/projects", {"name": "x"})):
        assert asker.post(path, data=data).status_code == 403, path
    assert asker.get(address).status_code == 200
