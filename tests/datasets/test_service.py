"""The life of a dataset: claimed once, read in a child, recorded whole or not at all, taken over, deleted with care."""

import json
import threading
import time

import pytest
from sqlalchemy import func, select, text, update

from app import db, queue
from app.datasets import ingest_task, token_counts
from app.datasets import service as datasets
from app.errors import BadField, Conflict, Unsupported
from app.kit import ids, sandbox
from app.leases import OVER
from app.storage import files
from app.tables import Dataset, Finding, Job, Outbox

GOOD = '{"messages": [{"role": "user", "content": "ask %d"}, {"role": "assistant", "content": "tell"}]}\n'


def rows(count):
    return "".join(GOOD % number for number in range(count))


@pytest.fixture
def make(session, user):
    def make(data=rows(20), name="x.jsonl", **rest):
        file = files.add_bytes(session, user, data.encode() if isinstance(data, str) else data, name, "fine-tune")
        dataset = datasets.create(session, user, file, **rest)
        session.commit()
        return dataset

    return make


def read(session, dataset):
    ingest_task.read(dataset.id)
    session.expire_all()
    return dataset


def test_reading_makes_rows_a_report_and_a_reference(session, make, data_dir):
    import pyarrow.parquet as pq

    dataset = read(session, make(rows(20) + '{"messages": []}\n'))
    assert (dataset.status, dataset.format, dataset.task, dataset.rows, dataset.good_rows) == ("ready", "chat", "generation", 21, 20)
    table = pq.read_table(data_dir / dataset.rows_path)
    assert table.column("line").to_pylist() == list(range(1, 21))
    assert json.loads(table.column("row")[3].as_py())["messages"][0] == {"role": "user", "content": "ask 3"}
    reference = datasets.reference(dataset)
    assert (reference.format, reference.rows, reference.path) == ("chat", 20, dataset.rows_path)
    assert datasets.stats(dataset).rows == 20 and datasets.stats(dataset).tokens is None
    found, more = datasets.findings(session, dataset, severity="error")
    assert [(finding.line, finding.rule) for finding in found] == [(21, "wrong_shape")] and not more
    assert not list((data_dir / "tmp").glob("child-*"))


def test_tokens_are_counted_as_the_model_counts_them(session, make, tiny_registered, data_dir):
    from transformers import AutoTokenizer

    dataset = read(session, make())
    tokenizer = AutoTokenizer.from_pretrained(data_dir / tiny_registered.path)
    wanted = sum(
        len(tokenizer.apply_chat_template(row["messages"], tokenize=True, return_dict=False)) for row in datasets.preview(dataset, 50)
    )
    stats = datasets.stats(dataset)
    assert stats.tokens == wanted
    assert 0 < stats.trained_tokens < stats.tokens
    assert stats.longest >= wanted / 20


@pytest.mark.long
def test_a_dataset_older_than_the_first_model_is_counted_later(session, make, request):
    dataset = read(session, make())
    assert token_counts.reap(session)["announced"] == 0
    request.getfixturevalue("tiny_registered")
    session.execute(update(Outbox).values(sent_at=func.clock_timestamp() - text("interval '1 minute'")))
    assert token_counts.reap(session)["announced"] == 1
    assert token_counts.reap(session)["announced"] == 0
    session.commit()
    hash_before = dataset.rows_sha256
    read(session, dataset)
    assert (dataset.status, dataset.rows_sha256, dataset.report["tokenizer"]) == ("ready", hash_before, "tiny")
    assert datasets.stats(dataset).tokens == read(session, make(rows(20), name="again.ndjson")).report["tokens"] > 0


def test_the_same_rows_have_the_same_hash_and_other_rows_another(session, make):
    first, second = read(session, make(name="a.json")), read(session, make(rows(21)))
    third = read(session, make(rows(20), "other.ndjson"))
    assert first.rows_sha256 == third.rows_sha256 != second.rows_sha256


def test_only_one_reader_at_a_time_and_a_stale_one_records_nothing(session, make):
    dataset = make()
    with db.transaction() as one:
        fence = ingest_task.claim(one, dataset.id)
    with db.transaction() as two:
        assert ingest_task.claim(two, dataset.id) is None
    session.execute(update(Dataset).values(lease_until=OVER))
    session.commit()
    with db.transaction() as three:
        assert ingest_task.claim(three, dataset.id) == fence + 1
        assert not ingest_task.heartbeat(three, dataset.id, fence, 0.5)
        assert ingest_task.heartbeat(three, dataset.id, fence + 1, 0.5)
    ingest_task._record_error(dataset.id, fence, {"message": "stale"})
    session.expire_all()
    assert dataset.status == "reading"


def test_the_reaper_announces_what_was_lost_and_gives_up_after_three_deaths(session, make, monkeypatch):
    dataset = make()
    assert ingest_task.reap(session)["announced"] == 0  # its message is still in the outbox
    session.execute(update(Outbox).values(sent_at=func.clock_timestamp() - text("interval '1 minute'")))
    assert ingest_task.reap(session)["announced"] == 1
    assert ingest_task.reap(session)["announced"] == 0
    session.execute(update(Outbox).values(sent_at=func.clock_timestamp() - text("interval '1 minute'")))
    session.execute(update(Dataset).values(deaths=2, lease_until=OVER))
    session.commit()
    session.expire_all()
    ingest_task.reap(session)
    session.commit()
    session.expire_all()
    assert dataset.status == "error" and "3 times" in dataset.error["message"] and dataset.error["hint"]


@pytest.mark.long
def test_a_reader_killed_in_the_middle_leaves_nothing_and_the_next_one_succeeds(session, make, data_dir, monkeypatch):
    """The child dies by SIGKILL; then the reader itself 'dies' between reading and recording."""
    dataset = make(rows(30_000))
    real = sandbox._listen

    def killed(process, *rest):
        threading.Timer(0.6, process.kill).start()
        return real(process, *rest)

    monkeypatch.setattr(sandbox, "_listen", killed)
    read(session, dataset)
    assert dataset.status == "error" and dataset.error["code"] == "out_of_memory"
    assert not list((data_dir / "rows").glob("*/*")) and session.scalar(select(func.count(Finding.id))) == 0
    monkeypatch.setattr(sandbox, "_listen", real)
    again = make(rows(30_000))

    def power_cut(*rest):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ingest_task, "_record", power_cut)
        with pytest.raises(KeyboardInterrupt):
            ingest_task.read(again.id)
    session.expire_all()
    assert again.status == "reading"
    session.execute(update(Dataset).values(lease_until=OVER))
    session.commit()
    read(session, again)
    assert again.status == "ready" and again.good_rows == 30_000


@pytest.mark.long
def test_a_parquet_file_tells_how_far_it_is_and_the_page_how_long(session, client, make, monkeypatch):
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq

    out, said = io.BytesIO(), []
    pq.write_table(pa.table({"text": [f"passage {n} " * 9 for n in range(60_000)]}), out)
    dataset = make(out.getvalue(), "x.parquet")
    heard = ingest_task._Reading.on_message
    monkeypatch.setattr(ingest_task._Reading, "on_message", lambda self, message: (said.append(message), heard(self, message))[1])
    read(session, dataset)
    shares = [message["progress"] for message in said if "progress" in message]
    assert dataset.good_rows == 60_000 and len(shares) > 1 and 0 < shares[0] < 0.9 and shares == sorted(shares)
    session.execute(update(Dataset).where(Dataset.id == dataset.id).values(status="reading", lease_until=None))
    session.commit()
    fence = ingest_task.claim(session, dataset.id)
    beaten = ingest_task._Reading(dataset.id, fence)
    beaten.on_message({"progress": 0.25, "rows": 4000})
    beaten._began -= 60
    session.commit()
    assert beaten.keep_going()
    page = client.get(f"/datasets/{ids.public(ids.DATASET, dataset.id)}").text
    assert "4,000 rows so far, about 3 min left." in page


@pytest.mark.long
def test_progress_is_told_while_it_reads_and_deleting_stops_it(session, user, make, data_dir):
    dataset = make(rows(200_000))
    seen = []

    def watch():
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            with db.transaction() as other:
                progress = other.get_one(Dataset, dataset.id).progress
                seen.append(progress)
                if progress and progress > 0.05:
                    datasets.delete(other, user, other.get_one(Dataset, dataset.id))
                    return
            time.sleep(0.1)

    watcher = threading.Thread(target=watch)
    watcher.start()
    ingest_task.read(dataset.id)
    watcher.join()
    session.expire_all()
    assert max(value or 0 for value in seen) > 0.05
    assert dataset.status == "reading" and dataset.deleted_at is not None
    assert not list((data_dir / "rows").glob("*/*"))


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("x.jsonl", b"{broken\n", "Line 1"),
        ("x.jsonl", b"\n\n", "no row"),
        ("x.csv", b"alpha,beta\n1,2\n", "could not match the columns"),
        ("x.jsonl", b'{"a": ' + b"[" * 100_000 + b"\n", "The only row cannot be read"),
        ("x.parquet", b"PAR1 not really", "Parquet"),
        ("x.txt", b"\xff\xfe\x00\xd8\x41\x00", "UTF-16"),
        ("x.json", b"[]", "no row"),
    ],
)
def test_a_file_that_cannot_be_read_at_all_says_where_and_what_to_do(session, make, name, data, words):
    dataset = read(session, make(data, name))
    assert dataset.status == "error"
    assert words in dataset.error["message"] and dataset.error["hint"]
    file = session.get(files.File, dataset.file_id)
    assert (file.status, file.status_details) == ("error", dataset.error["message"])
    with pytest.raises(Conflict):
        datasets.reference(dataset)


def test_text_that_postgres_cannot_hold_is_shown_another_way(session, make):
    row = {"messages": [{"role": "user", "content": "a\u0000b"}, {"role": "assistant", "content": "c\x07d <|im_end|>"}]}
    dataset = read(session, make(rows(12) + json.dumps(row) + "\n" + '{"messages": "\\u0000"}\n'))
    assert dataset.status == "ready"
    assert {rule["rule"] for rule in datasets.rules(dataset)} == {"control_character", "template_marker", "wrong_shape"}


@pytest.mark.long
def test_long_conversations_are_read_and_their_preview_is_cut(session, make):
    turns = [{"role": role, "content": f"{role} " * 700} for role in ("user", "assistant")] * 20
    long = "".join(json.dumps({"messages": [{**turns[0], "content": f"{n}"}, *turns[1:]]}) + "\n" for n in range(60))
    dataset = read(session, make(long))
    assert len(long) > 5_000_000 and (dataset.status, dataset.good_rows) == ("ready", 60)
    preview = dataset.report["preview"]
    assert preview[0]["cut"] and len(json.dumps(preview)) < 300_000 and len(datasets.preview(dataset)[0]["messages"]) > 10


def test_labels_of_any_length_stay_apart_in_the_report(session, make):
    rows = "".join(json.dumps({"text": f"text {n}", "label": "l" * 30_000 + str(n % 200)}) + "\n" for n in range(400))
    dataset = read(session, make(rows, format="classification"))
    assert dataset.status == "ready" and dataset.report["label_count"] == 200
    assert len(dataset.report["labels"]) == 200 and len(json.dumps(dataset.report)) < 1_000_000


def test_the_database_takes_what_json_allows_and_it_does_not(session, make):
    """NUL, half a character, and a number without end: refused rows, one good one, and a report that is stored."""
    odd = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "\\\\u0000 is how to write it"}], "n": 1e999}\n'
    dataset = read(session, make(rows(12) + odd + odd.replace("1e999", '["x\\u0000", 2.5]')))
    assert (dataset.status, dataset.rows, dataset.good_rows) == ("ready", 14, 13)
    assert {rule["rule"] for rule in datasets.rules(dataset)} == {"not_a_number"}
    assert dataset.report["preview"][-1]["row"]["metadata"]["n"] == ["x\ufffd", 2.5]
    assert dataset.report["preview"][-1]["row"]["messages"][1]["content"] == "\\u0000 is how to write it"


def test_opposite_verdicts_are_named_and_other_answers_to_a_rated_prompt_are_not(session, make):
    def lines(*rows):
        return "".join(json.dumps(row) + "\n" for row in rows)

    rated = [{"prompt": f"p {n}", "completion": "a", "label": True} for n in range(12)]
    other = [{"prompt": "p 3", "completion": "another", "label": False}, {"prompt": "p 4", "completion": "a", "label": False}]
    found, _ = datasets.findings(session, read(session, make(lines(*rated, *other))), rule="opposite_verdict")
    assert [(f.line, f.message) for f in found] == [(14, "Line 5 calls the same answer good. One of the two is wrong.")]
    pairs = [{"prompt": f"p {n}", "chosen": "a", "rejected": "b"} for n in range(12)]
    other = [{"prompt": "p 3", "chosen": "c", "rejected": "a"}, {"prompt": "p 4", "chosen": "b", "rejected": "a"}]
    found, _ = datasets.findings(session, read(session, make(lines(*pairs, *other))), rule="opposite_verdict")
    assert [f.line for f in found] == [14]


def test_equal_bytes_are_not_read_twice_unless_wanted_otherwise(session, user, make):
    first = read(session, make(rows(20) + "{bad\n"))
    second = make(rows(20) + "{bad\n")
    assert second.status == "ready" and second.rows_path == first.rows_path
    assert len(datasets.findings(session, second)[0]) == len(datasets.findings(session, first)[0]) == 1
    assert make(rows(20) + "{bad\n", format="sharegpt").status == "reading"
    assert make(rows(20) + "{bad\n", name="x.txt").status == "reading"
    with db.transaction() as other:
        datasets.delete(other, user, other.get_one(Dataset, first.id))
    assert (files.get_settings().data_dir / second.rows_path).exists()
    with db.transaction() as other:
        datasets.delete(other, user, other.get_one(Dataset, second.id))
    assert not (files.get_settings().data_dir / second.rows_path).exists()


def test_an_unfinished_job_guards_its_dataset_and_its_file(session, user, make, tiny_registered):
    dataset = read(session, make())
    job = Job(owner_id=user.id, name="j", spec={"dataset": {"path": "x"}}, model_id=tiny_registered.id, dataset_id=dataset.id)
    session.add(job)
    session.commit()
    with pytest.raises(Conflict, match="still needs"):
        datasets.delete_file(session, user, dataset.file_id)
    session.rollback()
    job.status = "succeeded"
    session.commit()
    datasets.delete_file(session, user, dataset.file_id)
    session.commit()
    assert datasets.list_(session, user) == []


def test_names_formats_and_extensions_are_checked_before_anything_is_made(session, user):
    file = files.add_bytes(session, user, b"x", "x.exe", "fine-tune")
    with pytest.raises(Unsupported):
        datasets.create(session, user, file)
    file.filename = "x.txt"
    with pytest.raises(BadField):
        datasets.create(session, user, file, format="excel")
    notes = files.add_bytes(session, user, b"x", "notes.txt", "user_data")
    with pytest.raises(BadField, match="not a dataset"):
        datasets.for_file(session, user, notes.id)


def test_the_order_is_in_the_outbox_of_the_same_transaction(session, make):
    dataset = make()
    assert session.scalars(select(Outbox.task).where(Outbox.key == dataset.id)).all() == [queue.READ]
