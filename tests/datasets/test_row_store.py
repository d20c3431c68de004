"""The stored rows: two flipped bytes are seen by everything that reads them, told with a hint, and mended by reading again."""

import json
import random

import pyarrow.parquet as pq
import pytest

from app.datasets import ingest_task
from app.datasets import service as datasets
from app.datasets.row_store import read_rows, row_at, verify_rows, write_rows
from app.errors import BadData
from app.kit import ids
from app.prompts import runs as prompt_runs
from app.prompts import service as prompts
from app.storage import files
from app.tables import Dataset
from tests.factories import chat_rows
from tests.worker.orders import Trainer, order, put_dataset, put_model
from worker.data.batching import read_rows as rows_to_learn
from worker.evaluation import attempt as evaluation_attempt


def flip(path, *places):
    """Two bytes of the file, by default among its rows."""
    data = bytearray(path.read_bytes())
    rows = pq.read_metadata(path).row_group(0).column(1)
    end = rows.data_page_offset + rows.total_compressed_size
    for place in places or (end - 20, end - 9):
        data[place] ^= 0x55
    path.write_bytes(data)


def test_any_two_flipped_bytes_are_seen_or_harm_no_row(tmp_path):
    path, draw = tmp_path / "rows.parquet", random.Random(1)
    sha256 = write_rows(path, chat_rows(60))
    whole, wanted, seen = path.read_bytes(), list(read_rows(path)), 0
    for _ in range(200):
        path.write_bytes(whole)
        flip(path, *draw.sample(range(len(whole)), 2))
        try:
            verify_rows(path, sha256, "talk")
        except BadData as error:
            seen += 1
            assert "dataset talk" in error.message and "again" in error.hint and error.code == "bad_data", error.message
        else:
            assert list(read_rows(path)) == wanted  # the bytes stand in what nobody reads, as the writer's name
    assert seen > 120
    path.write_bytes(whole[:-9])
    with pytest.raises(BadData, match="damaged"):
        row_at(path, 3)
    path.unlink()
    with pytest.raises(BadData, match="are gone"):
        verify_rows(path, sha256)


def test_rows_that_were_found_whole_are_not_hashed_again_until_they_are_touched(tmp_path, monkeypatch):
    path = tmp_path / "rows.parquet"
    sha256 = write_rows(path, chat_rows(5))
    verify_rows(path, sha256)
    with monkeypatch.context() as patch:
        patch.setattr("app.datasets.row_store.read_rows", lambda *rest: pytest.fail("it was read"))
        verify_rows(path, sha256)
    with pytest.raises(BadData, match="SHA-256"):
        verify_rows(path, "0" * 64)
    flip(path)
    with pytest.raises(BadData):
        verify_rows(path, sha256)


@pytest.mark.long
def test_a_job_on_damaged_rows_ends_as_bad_data_before_it_trains(data_dir, tiny_model):
    data = put_dataset(chat_rows(24))
    flip(data_dir / data.path)
    said, code = Trainer(order(put_model(tiny_model), data), "job", 1).run()
    assert [event.type for event in said if event.type != "log"] == ["failed"] and code == 1
    failed = said[-1]
    assert failed.kind == "bad_data" and "rows file of dataset rows is damaged" in failed.message and "/retry" in failed.hint
    assert not list((data_dir / "runs/job/a1").glob("checkpoint-*"))


@pytest.fixture
def dataset(session, user):
    lines = "".join(json.dumps(row) + "\n" for row in chat_rows(40))
    file = files.add_bytes(session, user, lines.encode(), "talk.jsonl", "fine-tune")
    made = datasets.create(session, user, file)
    session.commit()
    ingest_task.read(made.id)
    session.expire_all()
    return made


def evaluate(api, made):
    told = api.post("/v1/evaluations", json={"model": "tiny", "dataset_id": ids.public(ids.DATASET, made.id), "answers": 0}).json()
    evaluation_attempt.work(ids.parse(ids.EVALUATION, told["id"]))
    return api.get(f"/v1/evaluations/{told['id']}").json()


@pytest.mark.long
def test_damaged_rows_are_told_by_an_evaluation_and_a_comparison_and_read_again_from_the_file(
    api, client, session, user, dataset, data_dir, tiny_registered
):
    key, path = ids.public(ids.DATASET, dataset.id), data_dir / dataset.rows_path
    refused = api.post(f"/v1/datasets/{key}/retry")
    assert refused.status_code == 409 and "whole" in refused.json()["error"]["message"]
    file = files.get(session, user, dataset.file_id)
    twin = datasets.create(session, user, file)  # the same bytes: it shares the rows that were read already
    session.commit()
    assert twin.rows_path == dataset.rows_path
    flip(path)
    told = evaluate(api, dataset)
    assert told["status"] == "failed" and told["error"]["code"] == "bad_data" and "damaged" in told["error"]["message"]
    assert "again" in told["error"]["hint"]
    compared = compare(session, user, dataset)
    assert compared.status == "failed" and "damaged" in compared.error["message"] and "again" in compared.error["hint"]
    session.refresh(dataset)

    assert client.post(f"/datasets/{ids.public(ids.DATASET, twin.id)}/retry", follow_redirects=False).status_code == 303
    ingest_task.read(twin.id)
    session.expire_all()
    for each in (dataset, twin):
        reference = datasets.reference(session.get(Dataset, each.id))
        assert len(rows_to_learn(reference)) == 40 and data_dir / reference.path == path
    assert evaluate(api, dataset)["status"] == "succeeded"
    assert [file.name for file in (data_dir / "rows" / str(twin.id)).glob("*")] == []


def compare(session, user, dataset):
    from worker.evaluation import prompt_runs as evaluation_prompt_runs

    _, version = prompts.create(session, user, "ask", prompts.read_body(prompts.STARTS["few_shot"]))
    run = prompt_runs.create(session, user, version, "tiny", dataset, prompt_runs.RunOrder(rows=5))
    session.commit()
    evaluation_prompt_runs.work(run.id)
    session.expire_all()
    return run
