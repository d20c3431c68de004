"""What a file's id stands for once it was read several times."""

import json

import pytest
from sqlalchemy import select

from app.datasets import ingest_task
from app.kit import ids
from app.tables import Dataset
from worker import tasks

PLAIN = "".join(json.dumps({"prompt": f"Say {n}", "completion": f"number {n}"}) + "\n" for n in range(12)).encode()


@pytest.fixture
def plain_file(api, session):
    """(id of a file, the dataset that was read from it)."""
    sent = api.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("plain.jsonl", PLAIN)}).json()
    dataset = session.scalars(select(Dataset)).one()
    ingest_task.read(dataset.id)
    session.expire_all()
    return sent["id"], dataset


WRONG = [
    ({"format": "completion", "mapping": {"prompt": "nothing"}}, "no such"),  # fails as a whole
    ({"format": "chat", "mapping": {"messages": "prompt"}}, "no valid row"),  # every row is bad
]


@pytest.mark.parametrize(("wrong", "says"), WRONG, ids=["error", "no valid row"])
def test_a_wrong_reading_does_not_take_over_the_file(api, session, tiny_registered, plain_file, wrong, says):
    file_id, good = plain_file
    order = {"model": "tiny", "training_file": file_id}
    made = api.post(f"/v1/datasets/{ids.public(ids.DATASET, good.id)}/reparse", json=wrong).json()
    waiting = api.post("/v1/fine_tuning/jobs", json=order).json()  # ordered while it is read: takes what it gives
    assert waiting["status"] == "validating_files"
    tasks.read(str(ids.parse(ids.DATASET, made["id"])))
    session.expire_all()
    after = api.post("/v1/fine_tuning/jobs", json=order | {"seed": 2})
    assert after.status_code == 200, after.text
    for job in (api.get(f"/v1/fine_tuning/jobs/{waiting['id']}").json(), after.json()):
        assert job["status"] == "queued", job["error"]
        assert job["dataset"] == ids.public(ids.DATASET, good.id)
        assert any("Version 2 of plain" in text and says in text for text in job["estimate"]["warnings"])
    report = api.get(f"/v1/files/{file_id}/report").json()
    assert report["good_rows"] == 12 and report["failed_later"]["dataset"] == made["id"]
    right = api.post(f"/v1/datasets/{made['id']}/reparse", json={"format": "completion"}).json()
    ingest_task.read(ids.parse(ids.DATASET, right["id"]))
    last = api.post("/v1/fine_tuning/jobs", json=order | {"seed": 3}).json()
    assert last["dataset"] == right["id"] and not any("failed" in text for text in last["estimate"]["warnings"])
