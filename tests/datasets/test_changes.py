"""What a version changed is shown with its rows, and counts are counts of rows."""

import json
import uuid

import pytest

from app.datasets import changes, versions
from app.datasets import service as datasets
from app.datasets.row_store import write_rows
from app.kit import ids
from app.storage import files
from app.tables import Dataset
from app.views import dataset as dataset_view
from tests.data_worker import data_worker
from tests.datasets.test_versions import make
from tests.factories import read
from tests.routes.test_rows import until_ready

__all__ = ["make"]
TABLE = "\n".join(["text,label", *(f"text {n},{'account' if n % 2 else 'delivery'}" for n in range(12))])


def answered(api, address):
    """What the API says once the data worker has answered."""
    for _ in range(20):
        told = api.get(address).json()
        if told["status"] not in ("waiting", "running"):
            return told
    raise AssertionError("never answered")


def test_every_kind_of_change_is_counted_and_shown(tmp_path):
    def row(n, label="a"):
        return {"text": f"text {n}", "label": label}

    write_rows(tmp_path / "before", [row(n) for n in range(1, 5)])
    write_rows(tmp_path / "after", [row(1), row(2, "b"), row(33), row(4), row(5)])
    found = changes.look({"before": tmp_path / "before", "rows": tmp_path / "after"}, print)
    examples = found.pop("examples")
    assert found == {"removed": 0, "relabeled": 1, "edited": 1, "added": 1, "kept": 2}
    assert examples[0] == {"line": 2, "kind": "relabeled", "before": row(2), "after": row(2, "b")}
    assert [(one["line"], one["kind"]) for one in examples] == [(2, "relabeled"), (3, "edited"), (5, "added")]
    assert changes.words(found) == "1 row relabeled, 1 edited, 1 now valid"
    back = changes.look({"before": tmp_path / "after", "rows": tmp_path / "before"}, print)
    assert (back["removed"], back["added"]) == (1, 0) and changes.words(back) == "1 row removed, 1 relabeled, 1 edited"


@pytest.mark.long
def test_a_version_says_what_it_changed(session, user, make, client, api):
    first = make(TABLE, "tickets.csv")
    second = read(session, versions.relabel(session, user, first, [2], "account"))
    third = read(session, versions.drop_rows(session, user, second, [3, 4]))
    assert second.report["reason"] == first.report["reason"] and "You chose" not in third.report["reason"]
    path = f"/datasets/{ids.public(ids.DATASET, third.id)}"
    with data_worker():
        page = until_ready(client, f"{path}?tab=versions")
        told = answered(api, f"/v1/datasets/{ids.public(ids.DATASET, second.id)}/changes")
    assert "2 rows removed." in page and "text 1" in page and "10 rows unchanged" in page
    assert page.count("Changes<span") == 2, "each later version leads to its changes"
    assert (told["relabeled"], told["examples"][0]["after"]["label"]) == (1, "account")
    assert api.get(f"/v1/datasets/{ids.public(ids.DATASET, first.id)}/changes").json()["parent"] is None
    chosen = read(session, datasets.read_as(session, user, third, "classification", {"text": "text", "label": "label"}))
    assert chosen.report["reason"] == "Chosen by you."


def test_counts_are_counts_of_rows(session, user, tiny_registered, make, client):
    def said(text):
        return [{"role": "assistant", "content": text}]

    pairs = [
        {"prompt": f"q {n}", "chosen": said("word " * (1200 if n < 3 else 5)), "rejected": said("wort " * (1100 if n < 4 else 5))}
        for n in range(100)
    ]
    pairs[9] = {"prompt": "Mail a@harbor.de", "chosen": said("b@harbor.de"), "rejected": said("c@harbor.de")}
    data = "\n".join(map(json.dumps, pairs)).encode()
    dataset = read(session, datasets.create(session, user, files.add_bytes(session, user, data, "pairs.jsonl", "fine-tune")))
    counts = {rule["rule"]: rule["count"] for rule in datasets.rules(dataset)}
    listed = [one.line for one in datasets.findings(session, dataset, rule="personal_data")[0]]
    assert counts["personal_data"] == 1 and listed == [10]
    cut = dict(dataset.report["rows_cut"])
    assert cut[512] == 4 and counts.get("over_long", 0) + counts.get("nothing_left", 0) == 4, "a pair is one row"
    page = client.get(f"/datasets/{ids.public(ids.DATASET, dataset.id)}").text
    assert "100 of 100 rows usable" in page and "4 rows longer than 512 tokens" in page


def test_a_longer_limit_is_offered_where_rows_are_truncated():
    report = {"cutoff": 1024, "rows_cut": [[512, 60], [1024, 30], [2048, 3], [4096, 0]], "findings": {}}
    dataset = Dataset(id=uuid.uuid4(), status="ready", rows=102, good_rows=100, report=report)
    first, second = dataset_view.health(dataset)
    assert (first.severity, first.text) == ("warning", "100 of 102 rows usable")
    assert second.text == "30 rows longer than 1,024 tokens: truncated"
    assert second.link == "Raise max length to 2,048 (keeps 97% whole)"
    assert second.path.endswith("&run.max_length=2048")
    assert dataset_view.longer(dataset) == second
    dataset.report = report | {"cutoff": 512}
    assert dataset_view.health(dataset)[1].link == "See rows", "the model's window cannot be raised"


@pytest.mark.long
@pytest.mark.parametrize("side", ["train", "validation"])
def test_both_sides_of_a_split_are_listed(session, make, client, api, side):
    dataset = make(TABLE + "\n" + "text 3,account", "tickets.csv")
    key = ids.public(ids.DATASET, dataset.id)
    with data_worker():
        found = answered(api, f"/v1/datasets/{key}/split?fraction=0.25&side={side}")
        page = until_ready(client, f"/datasets/{key}/split?fraction=0.25&side={side}")
        itself = answered(api, f"/v1/datasets/{key}/split?validation={key}&side={side}")
    other = api.get(f"/v1/datasets/{key}/split?fraction=0.25&side={'train' if side == 'validation' else 'validation'}")
    assert other.json()["status"] == "waiting"
    assert len(found["rows"]) == found[side] and all(f">Line {row['line']}</a>" in page for row in found["rows"])
    assert all(row["other_line"] is not None for row in itself["rows"]) and all(row["other_line"] is None for row in found["rows"])
