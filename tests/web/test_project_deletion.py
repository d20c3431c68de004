"""A project is deleted: the preview, what is moved, what goes, what refuses, and what of its use stays."""

from __future__ import annotations

import pytest
from sqlalchemy import func, select

from app import graders, limits, saved_graders
from app.db import transaction
from app.errors import Conflict
from app.jobs import lifecycle, usage
from app.kit import ids
from app.models import aliases
from app.storage import files
from app.tables import AliasMove, Base, BrowserSession, Dataset, File, Job, MachineUse, Model, Project, Upload, User
from app.web import auth, project_deletion, projects
from tests.factories import make_dataset, make_job
from tests.web.test_people import made, signed_in
from tests.web.test_projects import ada, team, within_team  # noqa: F401  # fixtures


@pytest.fixture
def full(session, user, ada, team, data_dir, tiny_registered) -> Project:  # noqa: F811
    """The team's project with a file, a dataset, an ended job with its folder, a model, a key, a link and a guest's session."""
    mine = within_team(session.get_one(User, user.id), team)
    data = make_dataset(session, mine, data_dir)
    job = make_job(session, mine, tiny_registered, data)
    held = lifecycle.claim(session, job.id, "w")
    session.commit()
    lifecycle.fail(session, held, lifecycle.events.Failed(kind="bad_data", message="Row 3 is empty."))
    (data_dir / "runs" / str(job.id) / "a1").mkdir(parents=True)
    files.add_bytes(session, mine, b"of the team", "team.txt", "user_data")
    session.add(
        Model(owner_id=user.id, project_id=team.id, name="ours", title="Ours", kind="generic", path="models/x", shape=tiny_registered.shape)
    )
    session.flush()
    aliases.set_(session, mine, "favorite", "ours")
    auth.create_key(session, user, "of the team", project_id=team.id)
    projects.share(session, user, team)
    limits.count_tokens(session, ada.id, team.id, read=3, written=40)
    limits.count_tokens(session, ada.id, ada.id, read=1, written=2)
    session.commit()
    return team


def path_of(project: Project) -> str:
    return f"/v1/organization/projects/{ids.public(ids.PROJECT, project.id)}"


def left_in(session, project_id) -> dict[str, int]:
    """Rows of every table that still name the project."""
    session.rollback()
    found = {}
    for table in Base.metadata.sorted_tables:
        named = "project_id" in table.c and table.name != "checkpoint_permissions"
        if named and (count := session.scalar(select(func.count()).select_from(table).where(table.c.project_id == project_id))):
            found[table.name] = count
    return found


def test_the_preview_says_what_is_in_it(api, client, session, full):
    told = api.get(f"{path_of(full)}/contents").json()
    assert {name: count for name, count in told["counts"].items() if count} == {
        "files": 2, "datasets": 1, "jobs": 1, "models": 1, "aliases": 1,
    }  # fmt: skip
    assert told["bytes"] == limits.used_by(session, "project", full.id, "storage_bytes") > 0
    page = client.get(f"/settings/projects/{ids.public(ids.PROJECT, full.id)}").text
    assert "2 files, 1 dataset, 1 run" in page and "is deleted too" in page


def test_everything_that_belongs_to_a_project_is_in_the_preview(session, user, full, data_dir):
    parts = {Upload, AliasMove}  # of a file that is not there yet, and of an alias
    assert set(project_deletion.SHOWN.values()) == set(projects.owned_tables()) - parts
    alone = projects.create(session, user, "Bows")
    saved_graders.create(session, user.work_in(alone.id), graders.read({"type": "length", "name": "short", "max": 9}))
    with pytest.raises(Conflict, match="not empty: 1 grader"):
        project_deletion.remove(session, alone)


def test_without_a_word_about_its_contents_it_stays(api, session, full):
    refused = api.delete(path_of(full))
    assert refused.status_code == 409 and refused.json()["error"]["code"] == "project_not_empty"
    assert "2 files" in refused.json()["error"]["message"] and session.get(Project, full.id, populate_existing=True) is not None


def test_with_its_contents_nothing_of_it_is_left(api, session, user, ada, full, data_dir):  # noqa: F811
    job = session.scalar(select(Job.id).where(Job.project_id == full.id))
    blob = files.blob_path(session.scalar(select(File.sha256).where(File.filename == "team.txt")))
    rows = session.scalar(select(Dataset.id).where(Dataset.project_id == full.id))
    assert blob.exists() and (data_dir / "runs" / str(job)).exists() and (data_dir / "rows" / str(rows)).exists()
    before = usage.recent(session, 2e9)
    key, owned = full.id, session.scalar(select(func.count()).select_from(File).where(File.project_id == user.id))
    assert api.delete(path_of(full), params={"contents": "delete"}).json()["deleted"] is True
    assert left_in(session, key) == {} and session.get(Project, key) is None
    assert not blob.exists() and not (data_dir / "runs" / str(job)).exists() and not (data_dir / "rows" / str(rows)).exists()
    assert session.scalar(select(func.count()).select_from(File).where(File.project_id == user.id)) == owned
    use = session.scalars(select(MachineUse)).one()
    assert use.project_id is None and use.user_id == user.id, "nobody's use is forgotten by it"
    assert usage.recent(session, 2e9).keys() == before.keys()
    assert limits.used_by(session, "person", ada.id, "tokens_per_day") == 42


def test_what_is_in_it_moves(api, session, user, full):
    to = projects.create(session, user, "Cellos")
    session.commit()
    job = session.scalar(select(Job.id).where(Job.project_id == full.id))
    answer = api.delete(path_of(full), params={"move_to": ids.public(ids.PROJECT, to.id)})
    assert answer.json()["deleted"] is True, answer.text
    assert left_in(session, full.id) == {} and session.get_one(Job, job).project_id == to.id
    found = project_deletion.contents(session, to)
    assert (found.counts["files"], found.counts["models"], found.counts["aliases"]) == (2, 1, 1)


def test_taken_names_refuse_the_move(api, session, user, full):
    session.add(Model(owner_id=user.id, name="ours", title="Ours", kind="generic", path=None))
    session.commit()
    refused = api.delete(path_of(full), params={"move_to": ids.public(ids.PROJECT, user.id)})
    assert refused.status_code == 409 and "ours" in refused.json()["error"]["message"]
    assert left_in(session, full.id)["files"] == 2, "nothing was moved"


def test_what_is_running_or_used_elsewhere_refuses(session, user, full, data_dir, tiny_registered):
    other = make_job(session, user, tiny_registered, session.scalars(select(Dataset).where(Dataset.project_id == full.id)).one())
    for refused in ("used by another project", "running"):
        with pytest.raises(Conflict, match=refused), transaction() as own:
            project_deletion.remove(own, own.get_one(Project, full.id), with_contents=True)
        session.delete(session.get_one(Job, other.id)) if refused.startswith("used") else None
        session.commit()
        job = session.scalars(select(Job).where(Job.project_id == full.id)).one()
        job.status = "queued"
        session.commit()
        lifecycle.claim(session, job.id, "w")
        session.commit()


def test_a_persons_own_project_stays(api, session, user):
    refused = api.delete(f"/v1/organization/projects/{ids.public(ids.PROJECT, user.id)}", params={"contents": "delete"})
    assert refused.status_code == 409 and refused.json()["error"]["code"] == "personal_project"


def test_its_admin_deletes_it_on_the_page_and_nobody_else(web, client, session, user, ada, full):  # noqa: F811
    page = f"/settings/projects/{ids.public(ids.PROJECT, full.id)}"
    asker = signed_in(web, session, ada)
    assert asker.post(f"{page}/delete", data={"contents": "delete"}).status_code == 403
    assert signed_in(web, session, made(session, "Bo", "admin")).post(f"{page}/delete", data={"contents": "delete"}).status_code == 404
    theirs = projects.create(session, ada, "Hers")
    projects.set_member(session, theirs, user, "viewer")
    session.commit()
    for to in (ids.public(ids.PROJECT, theirs.id), ids.public(ids.PROJECT, ada.id)):
        assert client.post(f"{page}/delete", data={"contents": to}).status_code in (403, 404), (
            "one cannot put things where one may not work"
        )
    assert (
        client.post("/project", data={"project": ids.public(ids.PROJECT, full.id), "next": "/"}, follow_redirects=False).status_code == 303
    )
    done = client.post(f"{page}/delete", data={"contents": ids.public(ids.PROJECT, user.id)})
    assert done.status_code == 200 and "is deleted" in done.text and "2 files" in done.text
    assert session.scalar(select(func.count()).select_from(BrowserSession).where(BrowserSession.project_id.is_not(None))) == 0
    assert client.get("/datasets").status_code == 200, "the browser works in the person's own project again"
    assert left_in(session, full.id) == {}
