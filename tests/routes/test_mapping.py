"""Columns that no format knows: what they hold is suggested, and confirmed by one call or click."""

import json

import pytest

from app import formats
from app.datasets import ingest_task
from app.datasets import service as datasets
from app.kit import ids
from app.routes import overview
from app.storage import files
from tests.datasets.malformed_sheets import workbook

GERMAN = "\ufeffNr;Frage;Kategorie\n" + "".join(
    f"{n};Wo bleibt meine Geige Nummer {n}, die ich über Ihre Seite bestellt habe?;{('Lieferung', 'Rückgabe', 'Zahlung')[n % 3]}\n"
    for n in range(12)
)
ENGLISH = "created,customer_message,queue\n" + "".join(
    f'2026-01-{n + 10},"My order {n} has not arrived, and nobody answers.",{("billing", "shipping")[n % 2]}\n' for n in range(12)
)


def rows_of(**columns):
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


TEXTS = [f"Could you tell me how long the varnish number {n} has to dry?" for n in range(8)]
REPLIES = [f"It dries for {n} days, in a room that is warm and free of dust." for n in range(8)]
TURNS = [[{"role": "user", "content": text}, {"role": "assistant", "content": "Yes."}] for text in TEXTS]
CONTENTS = {
    "one text": (rows_of(Beitrag=TEXTS, id=range(8)), "plain_text", {"text": "Beitrag"}),
    "a text and its class": (rows_of(subject=TEXTS, team=["a", "b"] * 4), "classification", {"text": "subject", "label": "team"}),
    "question and answer": (rows_of(Antwort=REPLIES, Kunde=TEXTS), "instruction", {"instruction": "Kunde", "output": "Antwort"}),
    "names that say nothing": (rows_of(a=REPLIES, b=TEXTS), "instruction", {"instruction": "b", "output": "a"}),
    "an answer beside its class": (
        rows_of(kind=["x", "y"] * 4, Frage=TEXTS, Antwort=REPLIES),
        "instruction",
        {"instruction": "Frage", "output": "Antwort"},
    ),
    "a verdict": (rows_of(a=TEXTS, b=REPLIES, ok=["yes", "no"] * 4), "rated", {"prompt": "a", "completion": "b", "label": "ok"}),
    "conversations": (rows_of(thread=TURNS), "chat", {"messages": "thread"}),
    "conversations in a cell": (rows_of(thread=list(map(json.dumps, TURNS))), "chat", {"messages": "thread"}),
    "links, addresses, dates and numbers": (
        rows_of(u=["https://a.de/x"] * 8, m=["a@b.de"] * 8, d=["2026-01-02"] * 8, n=range(8)),
        None,
        {},
    ),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_what_columns_hold_is_judged_by_their_values(name):
    rows, wanted, mapping = CONTENTS[name]
    best, mappings = formats.suggest(rows)
    assert best == wanted and mappings.get(best or "", {}) == mapping


@pytest.mark.parametrize(
    ("name", "text", "mapping"),
    [
        ("fragen.csv", GERMAN, {"text": "Frage", "label": "Kategorie"}),
        ("tickets.csv", ENGLISH, {"text": "customer_message", "label": "queue"}),
    ],
)
def test_an_error_carries_what_is_needed_to_map_and_the_suggestion_is_taken(api, client, session, user, name, text, mapping):
    dataset = datasets.create(session, user, files.add_bytes(session, user, text.encode(), name, "fine-tune"))
    session.commit()
    ingest_task.read(dataset.id)
    path = f"/v1/datasets/{ids.public(ids.DATASET, dataset.id)}"
    error = api.get(path).json()["error"]
    assert error["code"] == "unknown_format" and error["message"].startswith("We could not match the columns")
    assert error["suggested"] == {"format": "classification", "mapping": mapping}
    assert error["columns"][1:] == list(mapping.values()) and len(error["preview"]) == 5
    assert error["preview"][0] == {column: error["preview"][0][column] for column in error["columns"]}
    made = api.post(f"{path}/reparse", json=error["suggested"]).json()
    ingest_task.read(ids.parse(ids.DATASET, made["id"]))
    after = api.get(f"/v1/datasets/{made['id']}").json()
    assert (after["status"], after["good_rows"], after["mapping"], after["error"]) == ("ready", 12, mapping, None)
    page = client.get(f"/datasets/{made['id']}").text
    assert "Change format or columns" in page and error["preview"][0][mapping["text"]] in page
    first, home = ids.public(ids.DATASET, dataset.id), client.get("/").text
    assert f'<a href="/datasets/{made["id"]}">Version 2</a> is ready' in client.get(f"/datasets/{first}").text
    assert made["id"] in home and first not in home and "1 dataset ready" in home, "versions of one dataset are one line"


def test_home_follows_a_file_that_is_read(client, session, user, monkeypatch):
    monkeypatch.setattr(overview, "STARTING_SECONDS", 0)
    dataset = datasets.create(session, user, files.add_bytes(session, user, ENGLISH.encode(), "tickets.csv", "fine-tune"))
    dataset.mapping = {"text": "customer_message", "label": "queue"}
    session.commit()
    follows = 'hx-get="/" hx-trigger="every 3s" hx-select="#steps"'
    assert follows in client.get("/").text
    ingest_task.read(dataset.id)
    home = client.get("/").text
    assert 'id="steps"' in home and follows not in home


def test_an_excel_file_is_read_in_the_limited_child(api, session, user):
    table = [line.split(";") for line in GERMAN.removeprefix("\ufeff").splitlines()]
    dataset = datasets.create(session, user, files.add_bytes(session, user, workbook(table, [["notes"]]), "fragen.xlsx", "fine-tune"))
    session.commit()
    ingest_task.read(dataset.id)
    key = ids.public(ids.DATASET, dataset.id)
    suggested = api.get(f"/v1/datasets/{key}").json()["error"]["suggested"]
    assert suggested == {"format": "classification", "mapping": {"text": "Frage", "label": "Kategorie"}}
    made = api.post(f"/v1/datasets/{key}/reparse", json=suggested).json()
    ingest_task.read(ids.parse(ids.DATASET, made["id"]))
    report = api.get(f"/v1/datasets/{made['id']}/report").json()
    assert report["good_rows"] == 12 and "other_sheets" in {entry["rule"] for entry in report["rules"]}


def test_a_format_chosen_at_the_upload_is_suggested_with_its_columns(api, session, user):
    file = files.add_bytes(session, user, GERMAN.encode(), "fragen.csv", "fine-tune")
    dataset = datasets.create(session, user, file, format="completion")
    session.commit()
    ingest_task.read(dataset.id)
    error = api.get(f"/v1/datasets/{ids.public(ids.DATASET, dataset.id)}").json()["error"]
    assert error["code"] == "incomplete_mapping"
    assert error["suggested"] == {"format": "completion", "mapping": {"prompt": "Frage", "completion": "Kategorie"}}
