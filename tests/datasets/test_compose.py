"""Datasets made of others: each row once and whole, the same order the same rows, nothing lost that is not said."""

import json
import random
from collections import Counter

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import select

from app import formats
from app.datasets import compose, compose_rows, ingest_task, versions
from app.datasets import service as datasets
from app.db import transaction
from app.errors import BadField, Conflict
from app.kit import ids
from app.tables import Dataset, File
from tests.factories import read, upload
from tests.formats.test_every_format import SHAPES


def chat(n, answer="tell"):
    return {"messages": [{"role": "user", "content": f"question {n}"}, {"role": "assistant", "content": f"{answer} {n}"}]}


@pytest.fixture
def make(session, user):
    return lambda rows, name="a.jsonl", **rest: upload(session, user, rows, name, **rest)


def rows_of(dataset, data_dir):
    return [json.loads(text) for text in pq.read_table(data_dir / dataset.rows_path)["row"].to_pylist()]


def key(dataset):
    return ids.public(ids.DATASET, dataset.id)


def join(session, user, operation, *parts, **rest):
    wish = {"operation": operation, "datasets": [part if isinstance(part, dict) else key(part) for part in parts], **rest}
    return compose.order(session, user, compose.CombineRequest.model_validate(wish))


def bare(row):
    return {name: value for name, value in row.items() if name != "metadata"}


def test_one_after_the_other_with_the_lineage_of_every_row(session, user, make, data_dir):
    first, second = make([chat(n) for n in range(12)]), make([{**chat(n), "topic": "wood"} for n in range(20, 35)], "b.jsonl")
    new = read(session, join(session, user, "concatenate", first, second))
    rows = rows_of(new, data_dir)
    assert [bare(row) for row in rows] == [chat(n) for n in [*range(12), *range(20, 35)]]
    assert rows[13]["metadata"] == {"topic": "wood", "source_dataset": "b", "source_line": 2}
    assert (new.version, new.parent_id, new.good_rows) == (2, first.id, 27)
    assert [(s["name"], s["size"], s["sha256"]) for s in new.origin["sources"]] == [
        ("a", 12, first.rows_sha256), ("b", 15, second.rows_sha256),
    ]  # fmt: skip
    file = session.get(File, new.file_id)
    assert file.status == "processed" and file.purpose == "fine-tune"
    assert datasets.for_file(session, user, file.id).id == new.id
    assert versions.describe(new) == "Concatenated"


def test_what_is_joined_can_be_mended_and_joined_again(session, user, make, data_dir):
    first = make([{**chat(n), "system": "Be brief.", "system_prompt": "a column of its own"} for n in range(12)])
    joined = read(session, join(session, user, "concatenate", first, make([chat(n) for n in range(50, 60)], "b.jsonl")))
    mended = read(session, versions.drop_rows(session, user, joined, [1, 2]))
    assert mended.good_rows == 20 and mended.version == 3
    assert rows_of(mended, data_dir)[0]["metadata"]["system_prompt"] == "a column of its own"
    again = read(session, join(session, user, "sample", mended, rows=5, seed=3))
    assert again.good_rows == 5


def test_a_mixture_keeps_its_weights_and_the_seed_decides_the_rest(session, user, make, data_dir):
    first, second = make([chat(n, "a") for n in range(90)]), make([chat(n, "b") for n in range(40)], "b.jsonl")
    parts = ({"dataset": key(first), "weight": 3}, {"dataset": key(second), "weight": 1})
    new = read(session, join(session, user, "mix", *parts, rows=80, seed=7))
    rows = rows_of(new, data_dir)
    assert Counter(row["metadata"]["source_dataset"] for row in rows) == {"a": 60, "b": 20}
    assert len({json.dumps(bare(row)) for row in rows}) == 80
    assert "b" in {row["metadata"]["source_dataset"] for row in rows[:20]}  # mixed, not one after the other
    same = read(session, join(session, user, "mix", *parts, rows=80, seed=7))
    other = read(session, join(session, user, "mix", *parts, rows=80, seed=8))
    assert same.rows_sha256 == new.rows_sha256 != other.rows_sha256
    most = read(session, join(session, user, "mix", *parts))
    assert most.good_rows == 120 and most.origin["rows"] == 120


def test_a_mixture_that_asks_for_too_much_says_how_much_there_is(session, user, make, data_dir):
    first, second = make([chat(n) for n in range(30)]), make([chat(n, "b") for n in range(10)], "b.jsonl")
    with pytest.raises(BadField, match=r"take 20 of b, which has 10.*at most 20 rows"):
        join(session, user, "mix", first, second, rows=40)
    new = read(session, join(session, user, "mix", first, second, rows=60, repeat=True))
    counted = Counter(row["metadata"]["source_line"] for row in rows_of(new, data_dir) if row["metadata"]["source_dataset"] == "b")
    assert set(counted.values()) == {3} and len(counted) == 10


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=8), st.integers(1, 10_000))
def test_shares_add_up_and_are_within_one_row_of_exact(weights, rows):
    found = compose_rows.shares(weights, rows)
    assert sum(found) == rows
    assert all(abs(count - rows * weight / sum(weights)) <= 1.01 for count, weight in zip(found, weights, strict=True))


def test_a_sample_is_drawn_once_each_and_in_the_order_of_the_file(session, user, make, data_dir):
    dataset = make([chat(n) for n in range(50)])
    new = read(session, join(session, user, "sample", dataset, rows=20, seed=1))
    lines = [row["metadata"]["source_line"] for row in rows_of(new, data_dir)]
    assert len(set(lines)) == 20 and lines == sorted(lines) and lines != list(range(1, 21))
    with pytest.raises(BadField, match="50 rows, fewer than 51"):
        join(session, user, "sample", dataset, rows=51)
    with pytest.raises(BadField, match="rows to sample is missing"):
        join(session, user, "sample", dataset)


def test_repetitions_go_the_exact_and_if_wished_the_near_ones(session, user, make, data_dir):
    draw = random.Random(3)
    words = [
        "belly",
        "back",
        "rib",
        "scroll",
        "neck",
        "bridge",
        "string",
        "peg",
        "bow",
        "maple",
        "spruce",
        "varnish",
        "glue",
        "clamp",
        "knife",
        "plane",
    ]
    text = [" ".join(draw.choices(words, k=40)) for _ in range(15)]
    rows = [chat(n, text[n]) for n in range(15)]
    near = {"messages": [rows[0]["messages"][0], {"role": "assistant", "content": rows[0]["messages"][1]["content"] + " indeed"}]}
    dataset = make([*rows, rows[4], {**rows[5], "topic": "x"}, near])
    exact = read(session, join(session, user, "deduplicate", dataset))
    assert exact.good_rows == 16 and exact.origin["left_out"] == {"duplicates": 2}
    thin = read(session, join(session, user, "deduplicate", dataset, near=True))
    assert thin.good_rows == 15 and thin.origin["left_out"] == {"duplicates": 2, "near_duplicates": 1}


def test_formats_that_differ_are_brought_together_where_nothing_is_lost(session, user, make, data_dir):
    told = make([{"instruction": f"Do {n}", "input": "it", "output": "done"} for n in range(12)], "i.jsonl")
    written = make(
        [{"prompt": f"Once {n}", "completion": " upon a time"} for n in range(11)] + [{"prompt": "", "completion": "x"}], "c.jsonl"
    )
    new = read(session, join(session, user, "concatenate", told, written, name="All"))
    rows = rows_of(new, data_dir)
    assert (new.format, new.name, new.good_rows) == ("chat", "All", 24)
    assert [m["content"] for m in rows[12]["messages"]] == ["Once 0", " upon a time"] and len(rows[23]["messages"]) == 1
    assert new.origin["converted"][1] == "c, completion to chat: each prompt becomes the user's turn and its completion the assistant's."
    texts = make([{"text": f"Some text {n}"} for n in range(10)], "t.jsonl")
    with pytest.raises(BadField, match=r"different formats.*i is instruction; t is plain text"):
        join(session, user, "concatenate", told, texts)


PAIRS = [{"prompt": f"Ask {n}", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(10)]


def test_pairs_become_ratings_and_ratings_pairs(session, user, make, data_dir):
    pairs = make(PAIRS)
    rated = read(session, join(session, user, "convert", pairs, format="rated"))
    assert rated.good_rows == 20 and rated.task == "kto"
    rows = rows_of(rated, data_dir)
    assert [row["good"] for row in rows[:4]] == [True, False, True, False] and rows[1]["answer"][0]["content"] == "bad 0"
    back = read(session, join(session, user, "convert", rated, format="preference"))
    assert [bare(row) for row in rows_of(back, data_dir)] == [bare(row) for row in rows_of(pairs, data_dir)]
    good = read(session, join(session, user, "convert", rated, format="chat"))
    assert good.good_rows == 10 and good.origin["left_out"] == {"left_out": 10}
    with pytest.raises(BadField, match="can be converted to chat, preference"):
        join(session, user, "convert", rated, format="plain_text")
    assert datasets.reference(rated).format == "rated"


def test_every_shape_is_read_back_from_its_file_row_for_row():
    for entry in formats.FORMATS.values():
        row = entry.normalise(entry.example, entry.guess_mapping(list(entry.example)))
        reader = formats.get(entry.shape)
        given_ = compose_rows.file_row(row, entry.shape)
        mapping = {
            field: column for field, column in (reader.guess_mapping(list(given_)) | compose_rows.MAPPINGS[entry.shape]).items() if column
        }
        assert reader.check(given_, mapping) == [] and reader.normalise(given_, mapping) == row, entry.name
    assert set(compose_rows.MAPPINGS) == {entry.shape for entry in formats.FORMATS.values()} == set(SHAPES)


def test_every_conversion_gives_rows_of_its_shape():
    rows = {entry.shape: entry.normalise(entry.example, entry.guess_mapping(list(entry.example))) for entry in formats.FORMATS.values()}
    rows["rated"]["good"] = True
    for (shape, wanted), how in compose_rows.CONVERSIONS.items():
        if (shape, wanted) != ("rated", "preference"):
            made = how.turn(rows[shape])
            assert made and all(set(row) == SHAPES[wanted] for row in made), (shape, wanted)
    tools = {"messages": [*chat(1)["messages"], *chat(2)["messages"]]}
    assert compose_rows.CONVERSIONS["chat", "instruction"].turn(tools) == [] == compose_rows.CONVERSIONS["chat", "completion"].turn(tools)


def test_a_source_that_is_deleted_meanwhile_is_named(session, user, make, data_dir):
    first, second = make([chat(n) for n in range(12)]), make([chat(n, "b") for n in range(12)], "b.jsonl")
    new = join(session, user, "concatenate", first, second)
    with pytest.raises(Conflict, match="reading"):
        join(session, user, "concatenate", first, new)
    session.commit()
    with transaction() as deleting:
        datasets.delete(deleting, user, deleting.get_one(Dataset, second.id))
    ingest_task.read(new.id)
    session.expire_all()
    assert new.status == "error" and "The rows of b are gone" in new.error["message"] and new.error["hint"]


def test_a_worker_that_dies_between_writing_and_reading_joins_nothing_twice(session, user, make, data_dir, monkeypatch):
    from app.datasets import ingest_task

    first = make([chat(n) for n in range(12)])
    new = join(session, user, "concatenate", first, make([chat(n, "b") for n in range(12)], "b.jsonl"))
    session.commit()

    def power_cut(*rest):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ingest_task, "_in_child", power_cut)
        ingest_task.read(new.id)
    session.expire_all()
    kept = new.file_id
    assert new.status == "reading" and kept is not None
    new.lease_until = None
    assert read(session, new).file_id == kept and new.good_rows == 24


def test_the_form_joins_and_says_what_is_wrong(session, user, make, client):
    first, second = make([chat(n) for n in range(12)]), make([chat(n, "b") for n in range(12)], "b.jsonl")
    page = client.get(f"/datasets/combine?first={key(first)}").text
    assert "Concatenate" in page and f'name="use.{key(first)}" checked' in page
    chosen = {"first": key(second), f"use.{key(first)}": "on", f"use.{key(second)}": "on", f"weight.{key(second)}": "2"}
    answer = client.post("/datasets/combine", data={"operation": "mix", "rows": "9", **chosen}, follow_redirects=False)
    assert answer.status_code == 303, answer.text
    new = session.scalars(select(Dataset).where(Dataset.origin["operation"].astext == "mix")).one()
    assert (read(session, new).parent_id, new.name) == (second.id, "b"), "the dataset it was asked from comes first"
    shown = client.get(answer.headers["location"] + "?tab=versions").text
    assert "Sources" in shown and "weight 2" in shown and "with seed 42" in shown and "Changes in version" not in shown
    wrong = client.post("/datasets/combine", data={"operation": "mix", "rows": "90", **chosen})
    assert wrong.status_code == 400 and "at most 18 rows" in wrong.text and f'name="use.{key(second)}" checked' in wrong.text
    for data, words in (({"operation": "mix"}, "Select at least one"), ({"operation": "boil", **chosen}, "operation"),
                        ({"operation": "sample", "rows": "x", **chosen}, "rows")):  # fmt: skip
        wrong = client.post("/datasets/combine", data=data)
        assert wrong.status_code == 400 and words in wrong.text


def test_programs_do_the_same(session, user, make, api):
    first, second = make([chat(n) for n in range(12)]), make([{"prompt": f"p {n}", "completion": "c"} for n in range(12)], "b.jsonl")
    order = {"operation": "mix", "datasets": [{"dataset": key(first), "weight": 2}, key(second)], "seed": 5}
    made = api.post("/v1/datasets", json=order).json()
    assert (made["object"], made["status"], made["version"], made["origin"]["rows"]) == ("dataset", "reading", 2, 18)
    assert "path" not in made["origin"]["sources"][0] and made["origin"]["converted"]
    read(session, session.get(Dataset, ids.parse(ids.DATASET, made["id"])))
    shown = api.get(f"/v1/datasets/{made['id']}").json()
    assert shown["good_rows"] == 18 and len(shown["versions"]) == 2
    assert {entry["id"] for entry in api.get("/v1/datasets").json()["data"]} == {made["id"], key(first), key(second)}
    for order, status in (({"operation": "boil", "datasets": [key(first)]}, 422), ({"operation": "mix", "datasets": []}, 422),
                          ({"operation": "mix", "datasets": [key(first), "ds-1"]}, 404), ({"operation": "mix", "datasets": [key(first)]}, 400)):  # fmt: skip
        answer = api.post("/v1/datasets", json=order)
        assert answer.status_code in (status, 400) and answer.json()["error"]["message"], answer.text


def test_programs_fix_edit_and_read_anew(session, user, make, api):
    wrong = {"messages": [{"role": "customer", "content": "a"}, {"role": "assistant", "content": "b"}]}
    dataset = make([*[chat(n) for n in range(10)], wrong, wrong])
    base = f"/v1/datasets/{key(dataset)}"
    report = api.get(f"{base}/report?rule=wrong_role").json()
    one = api.post(f"{base}/fixes", json={"finding": report["findings"][0]["id"]}).json()
    every = api.post(f"{base}/fixes", json={"rule": "wrong_role"}).json()
    edited = api.post(f"{base}/edits", json={"line": 1, "row": chat(99)}).json()
    dropped = api.post(f"{base}/edits", json={"drop": [1, 2]}).json()
    found = [read(session, session.get(Dataset, ids.parse(ids.DATASET, made["id"]))) for made in (one, every, edited, dropped)]
    assert [(made.version, made.good_rows) for made in found] == [(2, 11), (3, 12), (4, 10), (5, 8)]
    again = api.post(f"{base}/reparse", json={"format": "chat", "mapping": {"messages": "messages"}}).json()
    assert again["version"] == 6 and again["parent"] == key(dataset)
    for path, body in (("fixes", {}), ("fixes", {"rule": "duplicate"}), ("edits", {}), ("edits", {"line": 1, "row": {"messages": []}})):
        answer = api.post(f"{base}/{path}", json=body)
        assert answer.status_code == 400 and answer.json()["error"]["message"], answer.text
    assert api.delete(base).json()["deleted"] and api.get(base).status_code == 404
