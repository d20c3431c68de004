"""What is removed by itself: only what a setting says, only when it is old enough, and what the preview showed before."""

from __future__ import annotations

from datetime import timedelta

import pytest
from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from app import relay, retention
from app.db import transaction
from app.jobs import service as jobs
from app.settings import get_settings
from app.tables import Answer, Checkpoint, Dataset, Event, Exchange, Export, Job, Vote
from tests import lives


@pytest.fixture
def old(session: Session, user, tiny_registered, data_dir):
    """A studio with something for every rule: an old thing that goes, a new one that stays."""
    ids = {}
    for name in ("old", "new"):
        job = lives.order(session, user, tiny_registered, name=name)
        life = lives.Life(session, job).claim().say(lives.started(), *lives.steps(1, 30))
        folder = data_dir / "runs" / str(job.id) / "a1"
        folder.mkdir(parents=True)
        (folder / "trainer.log").write_text("step 1\n" * 100)
        for row in session.scalars(select(Checkpoint).where(Checkpoint.job_id == job.id)):
            row.path = f"runs/{job.id}/a1/checkpoint-{row.step}"
            (data_dir / row.path).mkdir()
            (data_dir / row.path / "weights").write_bytes(b"0" * 100)
        life.fail(lives.events.Failed(kind="bad_data", message="Row 3 is empty."))
        exchange = Exchange(owner_id=user.id, prompt=name, sampling={})
        session.add(exchange)
        session.flush()
        session.add(Answer(exchange_id=exchange.id, model_name="tiny", seed=1))
        session.add(Vote(owner_id=user.id, exchange_id=exchange.id, messages=[], left_model="a", right_model="b"))
        files = [{"name": "a.gguf", "bytes": 500}]
        export = Export(owner_id=user.id, model_id=tiny_registered.id, status="succeeded", format="gguf", spec={}, files=files)
        session.add(export)
        session.flush()
        (data_dir / "exports" / str(export.id)).mkdir(parents=True)
        ids[name] = (job.id, exchange.id, export.id)
    saved = Exchange(owner_id=user.id, prompt="saved", title="A comparison", sampling={})
    session.add(saved)
    session.flush()
    ago = func.clock_timestamp() - timedelta(days=40)
    job, exchange, export = ids["old"]
    session.execute(update(Job).where(Job.id == job).values(finished_at=ago))
    session.execute(update(Exchange).where(Exchange.id.in_([exchange, saved.id])).values(created_at=ago))
    session.execute(update(Export).where(Export.id == ids["new"][2]).values(finished_at=func.clock_timestamp()))
    session.execute(update(Export).where(Export.id == export).values(finished_at=ago))
    session.commit()
    return ids


def numbers() -> dict[str, int]:
    with transaction() as session:
        return {found.rule.name: found.count for found in retention.preview(session)}


def test_without_settings_nothing_is_ever_due(old, data_dir):
    assert numbers() == dict.fromkeys(("playground", "logs", "checkpoints", "exports", "deleted"), 0)
    with transaction() as session:
        assert retention.apply(session) == {}


def test_each_rule_removes_what_its_preview_showed(old, session, data_dir):
    settings = get_settings()
    settings.keep_playground_days = settings.keep_log_days = settings.keep_checkpoint_days = settings.keep_export_days = 30
    with transaction() as other:
        seen = {found.rule.name: (found.count, found.bytes) for found in retention.preview(other)}
    checkpoints = session.scalar(select(func.count()).select_from(Checkpoint).where(Checkpoint.job_id == old["old"][0]))
    assert checkpoints and seen["logs"] == (1, 700) and seen["exports"] == (1, 500)
    assert (seen["playground"][0], seen["checkpoints"][0], seen["deleted"][0]) == (1, checkpoints, 0)
    with transaction() as other:
        assert retention.apply(other) == {name: count for name, (count, _) in seen.items() if count}
    session.expire_all()
    assert set(numbers().values()) == {0}, "there is nothing left to remove"
    for name, there in (("old", False), ("new", True)):
        job, exchange, export = old[name]
        assert (data_dir / "runs" / str(job) / "a1" / "trainer.log").exists() == there
        assert bool(list((data_dir / "runs" / str(job)).glob("a1/checkpoint-*"))) == there
        assert (data_dir / "exports" / str(export)).exists() == there
        assert (session.get(Exchange, exchange) is not None) == there
        assert session.get_one(Job, job).status == "failed", "the job itself stays"
    assert session.scalars(select(Exchange.prompt).order_by(Exchange.prompt)).all() == ["new", "saved"]
    assert session.scalar(select(func.count()).select_from(Answer)) == 1 and session.scalar(select(func.count()).select_from(Vote)) == 2


def test_the_record_of_what_was_deleted_goes_once_nothing_refers_to_it(old, session, user, data_dir):
    settings = get_settings()
    job, dataset = old["old"][0], session.get_one(Job, old["old"][0]).dataset_id
    with transaction() as other:
        jobs.delete(other, user, job)
        other.execute(update(Dataset).where(Dataset.id == dataset).values(deleted_at=func.clock_timestamp()))
        other.flush()
        for table, key in ((Job, job), (Dataset, dataset)):
            other.execute(update(table).where(table.id == key).values(deleted_at=func.clock_timestamp() - timedelta(days=9)))
    settings.keep_deleted_days = 10
    assert numbers()["deleted"] == 0
    settings.keep_deleted_days = 8
    assert numbers()["deleted"] == 1, "the dataset is still referred to by the job"
    for expected in (1, 1, None):
        with transaction() as other:
            assert retention.apply(other).get("deleted") == expected
    session.expire_all()
    assert session.get(Job, job) is None and session.get(Dataset, dataset) is None
    assert session.scalar(select(func.count()).select_from(Event).where(Event.job_id == job)) == 0
    assert session.get(Job, old["new"][0]) is not None


def test_two_processes_do_not_remove_at_once(old):
    get_settings().keep_playground_days = 30
    with transaction() as one, transaction() as other:
        assert retention.apply(one) == {"playground": 1}
        assert retention.apply(other) == {}


def test_the_relay_applies_them(old, session):
    get_settings().keep_playground_days = 30
    turns = iter([False, True])
    relay.relay(lambda: next(turns, True))
    assert session.scalar(select(func.count()).select_from(Exchange)) == 2
