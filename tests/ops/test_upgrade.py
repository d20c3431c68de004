"""A data folder that an earlier version wrote opens, and what is in it goes on.

`tests/fixtures/dd046fc.tar.xz` was written by commit dd046fc itself (`tests/fixtures/write_dd046fc.py`): its tables and rows, and its files.
"""

from __future__ import annotations

import tarfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import NullPool, create_engine, func, select, text, update
from sqlalchemy.orm import Session

from app import graders, limits, migrate, saved_graders
from app.db import get_engine, transaction
from app.jobs import service as jobs
from app.models import aliases, exports
from app.storage import files
from app.tables import (
    AliasMove,
    AuditLog,
    Base,
    BatchAnswer,
    Dataset,
    DistillationRun,
    DistilledRow,
    Eval,
    EvalItem,
    EvalRun,
    Evaluation,
    Event,
    Inspection,
    Job,
    JobPlace,
    MachineUse,
    Model,
    ModelAlias,
    Project,
    PromptRun,
    RequestBatch,
    StopVisit,
    TrackedRun,
    Upload,
    UploadPiece,
    User,
    WebhookDelivery,
    WebhookEndpoint,
)
from app.web import oidc, people, projects, two_step
from tests.conftest import PROJECT, PostgresServer, wait_until
from tests.data_worker import data_worker
from worker.supervision import job_turn

ARCHIVE = PROJECT / "tests" / "fixtures" / "dd046fc.tar.xz"
WITH_ERROR = ("datasets", "models", "jobs", "inspections", "evaluations", "answers", "prompt_runs")


@pytest.fixture
def old(postgres: PostgresServer, data_dir: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Session]:
    """A session on the old database, before any step of migration, beside the old files."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(data_dir.parent, filter="data")
    admin = create_engine(postgres.url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
    name = "template_dd046fc"
    with admin.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    with psycopg.connect(postgres.url_of(name).replace("+psycopg", "")) as connection:
        connection.execute((data_dir.parent / "dump.sql").read_bytes())
    monkeypatch.setattr(postgres, "template", name)
    yield request.getfixturevalue("session")
    with admin.connect() as connection:
        connection.execute(text(f"DROP DATABASE {name}"))


@pytest.fixture
def upgraded(old: Session) -> Session:
    address = get_engine().url.render_as_string(hide_password=False)
    with get_engine().connect() as connection:
        assert not migrate.is_current(connection)
    migrate.upgrade(address)
    with get_engine().connect() as connection:
        assert migrate.is_current(connection)
    return old


def everything(session: Session) -> dict[str, list[dict[str, Any]]]:
    """Every row of every table, as JSON."""
    session.rollback()
    tables = session.scalars(text("SELECT tablename FROM pg_tables WHERE schemaname = 'public' ORDER BY 1")).all()
    found = {name: list(session.scalars(text(f"SELECT to_jsonb(t) FROM {name} t ORDER BY to_jsonb(t)::text"))) for name in tables}
    session.rollback()  # a step of migration waits for whoever reads
    return found


def run_alembic(move: str, revision: str) -> None:
    from alembic import command
    from alembic.config import Config

    config = Config(PROJECT / "alembic.ini")
    with get_engine().begin() as connection:
        config.attributes["connection"] = connection
        getattr(command, move)(config, revision)


def test_what_was_there_is_there(old, request):
    before = everything(old)
    after = everything(request.getfixturevalue("upgraded"))
    assert {name: len(rows) for name, rows in before.items()}.items() <= {name: len(rows) for name, rows in after.items()}.items()
    assert len(before["events"]) > 40 and len(before["jobs"]) == 3 and len(before["models"]) == 3
    for name in (
        "users",
        "files",
        "datasets",
        "models",
        "jobs",
        "checkpoints",
        "exchanges",
        "prompts",
        "prompt_versions",
        "outbox",
        "events",
    ):
        new = {row["id"]: row for row in after[name]}
        for row in before[name]:
            changed = {column for column, value in row.items() if new[row["id"]][column] != value}
            if row.get("type") == "doing":  # an event, called progress since 0014
                changed -= {"type"}
            if name == "jobs":  # whose passes of a step have a name of their own since 0009
                changed -= {"spec", "order"}
            assert changed <= {"error", "data"} and (not changed or "way_out" in str(row)), (name, changed)


def test_its_schema_is_that_of_a_new_database(upgraded):
    from alembic.autogenerate import compare_metadata
    from alembic.runtime.migration import MigrationContext

    context = MigrationContext.configure(upgraded.connection(), opts={"compare_type": True, "compare_server_default": True})
    found = [part for change in compare_metadata(context, Base.metadata) for part in (change if isinstance(change, list) else [change])]
    assert [" ".join(map(str, change)) for change in found] == []


def test_what_was_there_is_in_the_project_of_its_owner(old, request):
    before = everything(old)
    after = everything(request.getfixturevalue("upgraded"))
    assert [(row["id"], row["personal"]) for row in after["projects"]] == [(row["id"], True) for row in before["users"]]
    assert [(row["project_id"], row["user_id"], row["role"]) for row in after["project_members"]] == [
        (row["id"], row["id"], "admin") for row in before["users"]
    ]
    counts = {}
    for table in projects.owned_tables():
        rows = after[table.__tablename__]
        counts[table.__tablename__] = len(rows)
        assert all(row["project_id"] == row["owner_id"] for row in rows), table
    assert sum(bool(count) for count in counts.values()) >= 8, counts


def test_two_projects_with_one_name_go_down_and_up_again(upgraded, user):
    """The studio of before has one space of names: the younger model is renamed there, and nothing is lost."""
    other = projects.create(upgraded, user, "Another")
    named = [Model(owner_id=user.id, project_id=place, name="violin", title="Violin", kind="generic") for place in (user.id, other.id)]
    upgraded.add_all(named)
    upgraded.flush()
    upgraded.add_all(ModelAlias(owner_id=user.id, project_id=one.project_id, name="favorite", model_id=one.id) for one in named)
    upgraded.commit()
    run_alembic("downgrade", "0018")
    down = everything(upgraded)
    assert len({row["name"] for row in down["models"] if row["title"] == "Violin"}) == 2 and len(down["model_aliases"]) == 1
    run_alembic("upgrade", "head")
    assert all(row["project_id"] == row["owner_id"] for row in everything(upgraded)["models"] if row["owner_id"])


def test_errors_say_hint(upgraded):
    rows = everything(upgraded)
    assert "way_out" not in str(rows)
    for name in WITH_ERROR:
        (error,) = [row["error"] for row in rows[name] if row["error"]]
        assert error["message"] and error["hint"], name
    failed = upgraded.scalars(select(Event).where(Event.type == "failed")).one()
    assert failed.data["hint"]
    assert [row["result"] for row in rows["prompt_runs"]] == [{"rows": 3}], "what its lease once kept there has columns now"


@pytest.mark.long
def test_pages_and_programs_read_it(upgraded, client, api):
    listed = {job["status"]: job for job in api.get("/v1/fine_tuning/jobs").json()["data"]}
    assert set(listed) == {"succeeded", "paused", "failed"}
    assert listed["failed"]["error"]["hint"] and listed["succeeded"]["fine_tuned_model"]
    for job in listed.values():
        events = api.get(f"/v1/fine_tuning/jobs/{job['id']}/events?limit=100").json()["data"]
        assert events and all(event["message"] for event in events)
        for tab in ("overview", "metrics", "samples", "evaluation", "data", "config"):
            assert client.get(f"/jobs/{job['id']}?tab={tab}").status_code == 200
    assert {model["id"] for model in api.get("/v1/models").json()["data"]} >= {"tiny", listed["succeeded"]["fine_tuned_model"]}
    datasets = api.get("/v1/datasets").json()["data"]
    assert {found["name"]: found["status"] for found in datasets} == {"chat": "ready", "broken": "error"}
    for found in datasets:
        assert client.get(f"/datasets/{found['id']}").status_code == 200
    (chat,) = [found for found in datasets if found["name"] == "chat"]
    with data_worker():
        wait_until(lambda: api.get(f"/v1/datasets/{chat['id']}/rows").json()["data"], what="the rows", seconds=60)
    for page in ("/", "/jobs", "/models", "/datasets", "/playground"):
        assert client.get(page).status_code == 200, page


@pytest.mark.long
@pytest.mark.timeout(300)
def test_a_paused_job_goes_on_from_its_checkpoint(upgraded, user):
    job = upgraded.scalars(select(Job).where(Job.status == "paused")).one()
    seen = job.step
    with transaction() as session:
        jobs.resume(session, user, job.id)
    job_turn.work(job.id)
    upgraded.refresh(job)
    assert job.status == "succeeded", job.error
    events = upgraded.scalars(select(Event).where(Event.job_id == job.id).order_by(Event.id)).all()
    assert [event.data["resumed_from"] for event in events if event.type == "started"] == [None, seen]
    steps = {event.data["step"]: event.data["loss"] for event in events if event.type == "step"}
    assert sorted(steps) == list(range(1, job.total_steps + 1)) and steps[job.total_steps] < steps[1]
    assert upgraded.scalars(select(Model).where(Model.job_id == job.id)).one().status == "ready"


def fill(session: Session, user: User) -> None:
    """Rows that the newest steps of migration have something to do with."""
    aliases.set_(session, user, "favorite", "tiny")
    for table in (Inspection, PromptRun, Evaluation, Job):
        session.execute(update(table).values(deaths=2))
    exports.create(session, user, "tiny", "gguf", ["F16"])
    people.invite(session, user, "viewer", "Ada")
    projects.share(session, user, session.get_one(Project, user.id))
    two_step.begin(session, user)
    oidc.connect(session, user, oidc.Claims("https://id.example", "1", "Ada", ""))
    saved_graders.create(session, user, graders.read({"type": "length", "name": "short", "max": 9}))
    session.add(AuditLog(type="job.cancelled", actor="console"))
    session.add(MachineUse(user_id=user.id, project_id=user.id, kind="jobs", row_id=user.id, fence=1))
    limits.count_tokens(session, user.id, user.id, read=3, written=4)
    later(session, user)
    session.execute(update(Inspection).values(fence=3, lease_until=func.clock_timestamp(), status="running"))
    session.commit()


def later(session: Session, user: User) -> None:
    """A row of each table that came with 0029 and after."""
    file = files.add_bytes(session, user, b"{}", "in.jsonl", "batch")
    batch = RequestBatch(owner_id=user.id, endpoint="/v1/completions", input_file_id=file.id, expires_at=func.clock_timestamp())
    endpoint = WebhookEndpoint(owner_id=user.id, name="ci", url="https://hooks.example.com/a", event_types=["batch.failed"])
    made = Eval(owner_id=user.id, name="a", data_source_config={"type": "custom"}, criteria=[])
    session.add_all([batch, endpoint, made])
    session.flush()
    run = EvalRun(owner_id=user.id, eval_id=made.id, name="a", data_source={"type": "jsonl"})
    session.add(run)
    session.flush()
    session.add(BatchAnswer(batch_id=batch.id, line=1, custom_id="a", request_id="req_1", status_code=200, body={}))
    session.add(WebhookDelivery(endpoint_id=endpoint.id, event_key=uuid.uuid4(), event={}))
    session.add(TrackedRun(job_id=session.scalars(select(Job.id)).first(), kind="tensorboard", wish={}))
    session.add(AliasMove(owner_id=user.id, user_name=user.name, alias="favorite", to_name="tiny", how="set"))
    dataset, teacher = session.scalars(select(Dataset.id)).first(), session.scalars(select(Model.id)).first()
    distillation = DistillationRun(owner_id=user.id, model_id=teacher, dataset_id=dataset, spec={})
    session.add(distillation)
    session.flush()
    session.add(DistilledRow(run_id=distillation.id, line=1, messages=[], answers=[]))
    session.add(StopVisit(owner_id=user.id, stop="next-token", refs={}))
    job = session.scalars(select(Job.id).limit(1)).one()
    session.add(JobPlace(job_id=job, fence=1, worker="one", machine="one", place=0, address="10.0.0.1:29500"))
    upload = Upload(owner_id=user.id, filename="x", purpose="user_data", length=9, path="tmp/tus-x", expires_at=func.now())
    session.add(upload)
    session.flush()
    session.add(UploadPiece(upload_id=upload.id, start=0, bytes=5, path="uploads/x/y"))
    session.add(EvalItem(run_id=run.id, place=0, status="pass", item={}, sample={}, results=[]))


def without_lease(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key not in ("deaths", "fence")} for row in rows]


def without_time(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != "created_at"}


NEW = {
    "model_aliases": "0012",
    "exports": "0016",
    "invitations": "0017",
    "two_step": "0017",
    "audit_logs": "0021",
    "identities": "0023",
    "machine_uses": "0024",
    "token_uses": "0025",
    "graders": "0026",
    **dict.fromkeys(("batches", "batch_answers"), "0029"),
    **dict.fromkeys(("webhook_endpoints", "webhook_deliveries"), "0030"),
    **dict.fromkeys(("evals", "eval_runs", "eval_items"), "0031"),
    "tracked_runs": "0033",
    "alias_moves": "0034",
    **dict.fromkeys(("distillation_runs", "distilled_rows"), "0035"),
    "stop_visits": "0036",
    "upload_pieces": "0039",
    "job_places": "0042",
    **dict.fromkeys(("projects", "project_members", "share_links"), "0019"),
}
"""Tables that did not exist before a revision, so a step back loses their rows."""


OLD = [f"{number:04}" for number in range(11, 36)]


@pytest.mark.parametrize(
    "revision", ["0042", "0041", "0040", "0039", "0038", "0037", "0036", *(pytest.param(one, marks=pytest.mark.fault) for one in OLD)]
)
def test_a_step_goes_down_and_up_again_with_rows_in_it(upgraded, user, revision):
    fill(upgraded, user)
    full = everything(upgraded)
    assert all(full[name] for name in NEW)
    run_alembic("downgrade", f"{revision}-1")
    down = everything(upgraded)
    assert {name: len(rows) for name, rows in down.items() if name not in NEW} == {
        name: len(rows) for name, rows in full.items() if name not in NEW
    }
    errors = [row["error"] for name in WITH_ERROR for row in down[name] if row["error"]]
    told, other = ("hint", "way_out") if revision > "0013" else ("way_out", "hint")
    assert len(errors) == len(WITH_ERROR) and all(error[told] and other not in error for error in errors)
    assert ("doing" in {row["type"] for row in down["events"]}) == (revision <= "0014")
    assert {name for name in NEW if name in down} == {name for name, since in NEW.items() if revision > since}
    assert ("deaths" in down["inspections"][0]) == (revision != "0011")
    run_alembic("upgrade", "head")
    again = everything(upgraded)
    for name in full:
        if name in ("projects", "project_members") and revision <= "0019":  # made of the people
            assert [without_time(row) for row in again[name]] == [without_time(row) for row in full[name]]
        elif name in NEW:
            assert again[name] == (full[name] if revision > NEW[name] else [])
        elif revision == "0011" and name not in ("jobs", "evaluations"):  # whose leases had these columns before
            assert without_lease(again[name]) == without_lease(full[name]), name
        else:
            assert again[name] == full[name], name


@pytest.mark.long
@pytest.mark.studio
def test_luthier_upgrade_backs_up_first_and_the_backup_is_of_before(upgraded, tmp_path_factory):
    """A studio whose schema is two steps old: what is missing is said, then backed up, then run; and the backup restores as it was."""
    import shutil
    import subprocess
    import sys
    import tempfile

    from app.ops import backup
    from app.ops.backup.store import Store
    from app.settings import get_settings
    from tests.conftest import studio_environment

    above = Path(tempfile.mkdtemp(prefix="luthier-upgrade-"))
    above.chmod(0o711)
    source, kept = above / "source", above / "kept"

    def luthier(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "app.cli", *arguments, "--data-dir", str(source)]
        return subprocess.run(command, cwd=PROJECT, env=studio_environment(source), capture_output=True, text=True, timeout=120)

    try:
        assert "holds no studio" in luthier("upgrade").stderr
        run_alembic("downgrade", "0014")
        backup.take(kept)  # as an older version would have: its restore runs the steps that are missing
        assert luthier("restore", str(kept)).returncode == 0
        shutil.rmtree(source)
        newest = migrate.newest()
        assert Store(kept).manifest()["schema"] == "0014" and get_settings().database_url
        rows_before = Store(kept).manifest()["tables"]["events"]["rows"]
        with psycopg.connect(str(get_settings().database_url).replace("+psycopg", "")) as connection:
            assert connection.execute("SELECT version_num FROM alembic_version").fetchone() == ("0014",)
        database = {"LUTHIER_DATABASE_URL": str(get_settings().database_url), "LUTHIER_REDIS_URL": str(get_settings().redis_url)}
        folder = get_settings().data_dir

        def beside(*arguments: str) -> subprocess.CompletedProcess[str]:
            command = [sys.executable, "-m", "app.cli", *arguments]
            environment = studio_environment(folder, **database)
            return subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=120)

        planned = beside("upgrade", "--plan", "--backup", str(above / "first"))
        assert planned.returncode == 0 and "  0015  " in planned.stdout and f"  {newest}  " in planned.stdout, planned.stderr
        assert not (above / "first").exists()
        done = beside("upgrade", "--backup", str(above / "first"))
        assert done.returncode == 0 and f"The schema is {newest}." in done.stdout, done.stderr
        told = Store(above / "first").manifest()
        assert told["schema"] == "0014" and told["tables"]["events"]["rows"] == rows_before
        with get_engine().connect() as connection:
            assert migrate.is_current(connection)
        assert "nothing to do" in beside("upgrade").stdout
    finally:
        shutil.rmtree(above, ignore_errors=True)
