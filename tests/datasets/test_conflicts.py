"""Rows that contradict each other: both are shown, and each choice makes a version in which exactly that is done."""

import json

import pytest

from app.datasets import conflicts, versions
from app.datasets import service as datasets
from app.errors import BadField, NotFound
from app.kit import ids
from app.storage import files
from app.tables import Dataset
from tests.data_worker import data_worker
from tests.datasets.test_versions import make, rows_of
from tests.factories import read
from tests.routes.test_rows import until_ready

__all__ = ["make"]
TABLE = ["text,label", *(f"text {n},{'account' if n % 2 else 'delivery'}" for n in range(12)), "text 2,account", "text 4,Delivery"]


@pytest.fixture
def tickets(make):
    return make("\n".join(TABLE), "tickets.csv")


def labels_of(dataset, data_dir):
    return {line: row["label"] for line, row in rows_of(dataset, data_dir).items()}


@pytest.mark.parametrize(
    ("do", "changed"),
    [
        ("keep:4", {14: None}),
        ("keep:14", {4: None}),
        ("remove", {4: None, 14: None}),
        ("relabel", {4: "returns", 14: "returns"}),
    ],
)
def test_each_choice_does_exactly_what_it_says(session, user, tickets, data_dir, do, changed):
    before = labels_of(tickets, data_dir)
    new = read(session, conflicts.resolve(session, user, tickets, 4, do, "returns"))
    wanted = {line: label for line, label in (before | changed).items() if label}
    assert labels_of(new, data_dir) == wanted and labels_of(tickets, data_dir) == before
    assert [group.lines for group in conflicts.groups(session, new)[0]] == [[6, 15]]


def test_a_choice_that_is_none_is_refused(session, user, tickets):
    for first, do, label, error in (
        (4, "keep:5", "", BadField),
        (4, "relabel", " ", BadField),
        (5, "remove", "", NotFound),
        (2**53, "remove", "", NotFound),
    ):
        with pytest.raises(error):
            conflicts.resolve(session, user, tickets, first, do, label)
    (found, *_), _ = datasets.findings(session, tickets, rule="other_label")
    for fix in (
        lambda: versions.fix_some(session, user, tickets, [found.id]),
        lambda: versions.fix_all(session, user, tickets, found.rule),
    ):
        with pytest.raises(BadField):
            fix()
    assert versions.next_number(session, tickets) == 2


def test_spellings_of_a_label_become_one_in_every_row(session, user, tickets, data_dir, api):
    (found,), _ = datasets.findings(session, tickets, rule="label_variants")
    assert found.line == 15 and found.fix["label"] == "Merge into “delivery”"
    typed = read(session, versions.edit_row(session, user, tickets, 2, json.dumps({"text": "text 0", "label": "Delivery"})))
    merged = versions.fix_all(session, user, typed, "label_variants")
    assert merged.rows == 2 and set(labels_of(read(session, merged.dataset), data_dir).values()) == {"account", "delivery"}
    later = read(session, versions.relabel(session, user, merged.dataset, [3], "Delivery"))
    assert labels_of(later, data_dir)[3] == "Delivery", "what is typed after a merge stays as it was typed"
    key = ids.public(ids.DATASET, later.id)
    told = api.post(f"/v1/datasets/{key}/edits", json={"lines": [3], "label": "account"}).json()
    assert told["origin"]["label"] == "account"
    assert api.post(f"/v1/datasets/{key}/edits", json={"lines": [3], "label": "a", "drop": [4]}).status_code == 400


def test_both_rows_are_on_the_page_with_their_texts(session, user, client):
    talk = [{"prompt": f"question {n}", "completion": f"answer {n}"} for n in range(11)] + [
        {"prompt": "question 3", "completion": "not that"}
    ]
    data = "\n".join(map(json.dumps, talk)).encode()
    dataset = read(session, datasets.create(session, user, files.add_bytes(session, user, data, "talk.jsonl", "fine-tune")))
    path = f"/datasets/{ids.public(ids.DATASET, dataset.id)}"
    assert f"{path}/conflicts?line=12" in client.get(path + "?tab=issues").text
    with data_worker():
        page = until_ready(client, f"{path}/conflicts?line=12")
    assert "answer 3" in page and "not that" in page and page.count("Keep this") == 2 and "Remove both" in page and "Relabel" not in page
    answer = client.post(f"{path}/conflicts", data={"first": 4, "do": "keep:12"}, follow_redirects=False)
    new = session.get(Dataset, ids.parse(ids.DATASET, answer.headers["location"].split("/")[2]))
    assert "Kept line 12, removed 1 row" in versions.describe(new)
    assert read(session, new).good_rows == 11 and "No conflicting rows" in client.get(answer.headers["location"]).text
    assert client.post(f"{path}/conflicts", data={"first": 4, "do": "keep:5"}).status_code == 400
