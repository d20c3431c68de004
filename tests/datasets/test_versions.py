"""New versions: every fix does what its button says, to one row or to all of its kind, and the parent never changes."""

import csv
import io
import json
import re

import pyarrow.parquet as pq
import pytest

from app import formats
from app.datasets import edits, findings_export, ingest_task, versions
from app.datasets import service as datasets
from app.errors import BadField, Conflict
from app.kit import ids
from app.storage import files
from app.tables import Dataset, Finding
from tests.factories import read, upload


def chat(*turns, **rest):
    return json.dumps({"messages": [{"role": role, "content": text} for role, text in turns], **rest})


GOOD = chat(("user", "ask {}"), ("assistant", "tell"))


@pytest.fixture
def make(session, user):
    return lambda lines, name="x.jsonl": upload(session, user, "\n".join(lines) if isinstance(lines, list) else lines, name)


def rows_of(dataset, data_dir):
    table = pq.read_table(data_dir / dataset.rows_path)
    return dict(zip(table["line"].to_pylist(), map(json.loads, table["row"].to_pylist()), strict=True))


def some(count, first=0):
    return [GOOD.replace("{}", f"question number {n}") for n in range(first, first + count)]


def test_one_finding_is_fixed_and_the_parent_stays_as_it_is(session, user, make, data_dir):
    parent = make([*some(12), chat(("customer", "a"), ("assistant", "b")), chat(("customer", "c"), ("assistant", "d"))])
    before = (parent.rows_sha256, parent.good_rows)
    found, _ = datasets.findings(session, parent, rule="wrong_role")
    new = read(session, versions.fix_some(session, user, parent, [found[0].id]).dataset)
    assert (new.version, new.parent_id, new.good_rows) == (2, parent.id, 13)
    assert rows_of(new, data_dir)[13]["messages"][0] == {"role": "user", "content": "a"}
    assert [f.line for f in datasets.findings(session, new, rule="wrong_role")[0]] == [14]
    session.refresh(parent)
    assert (parent.rows_sha256, parent.good_rows) == before and parent.edits is None
    assert versions.describe(new) == "Fixed invalid role in 1 row"


def test_all_of_a_kind_are_fixed_each_by_its_own_fix(session, user, make, data_dir):
    parent = make(
        [
            *some(10),
            chat(("user", "a"), ("user", "b"), ("user", "c"), ("assistant", "d")),
            chat(("user", "a"), ("assistant", "b"), ("user", "c")),
            chat(("user", "a"), ("assistant", "b"), ("system", "s"), ("assistant", "c")),
        ]
    )
    assert parent.good_rows == 10
    new = read(session, versions.fix_all(session, user, parent, "wrong_role_order").dataset)
    rows = rows_of(new, data_dir)
    assert [m["content"] for m in rows[11]["messages"]] == ["a\n\nb\n\nc", "d"]
    assert [m["role"] for m in rows[12]["messages"]] == ["user", "assistant"]
    assert [m["role"] for m in rows[13]["messages"]] == ["system", "user", "assistant"]
    assert not [rule for rule in datasets.rules(new) if rule["rule"] == "wrong_role_order"]


def test_unknown_roles_are_asked_once_and_no_fix_drops_their_rows(session, user, make, data_dir, api):
    nested = json.dumps({"input": {"messages": [{"role": "kunde", "content": "a"}]}, "preferred_output": "b", "non_preferred_output": "c"})
    pairs = make([nested] * 2, "pairs.jsonl")
    assert read(session, versions.fix_all(session, user, pairs, "wrong_role").dataset).good_rows == 2
    talk = chat(("Customer", "a"), ("narrator", "b"), ("user", "c"), ("agent", "d"))
    parent = make([*some(10), talk, chat(("user", "x"), ("narrator", "y")), chat(("user", "x"), (3, "y"))])
    path = f"/v1/datasets/{ids.public(ids.DATASET, parent.id)}"
    asked = {entry["role"]: (entry["messages"], entry["suggested"]) for entry in api.get(f"{path}/report").json()["unknown_roles"]}
    assert asked == {"narrator": (2, None), "customer": (1, "user"), "agent": (1, "assistant")}
    fixed = read(session, versions.fix_all(session, user, parent, "wrong_role").dataset)
    assert fixed.rows == 13 and fixed.good_rows == 10  # still there, and still asked about
    assert [entry["role"] for entry in datasets.unknown_roles(fixed)] == ["narrator"]
    for wrong in ({"narrator": "judge"}, {"stranger": "user"}):
        refused = api.post(f"{path}/fixes", json={"roles": wrong})
        assert refused.status_code == 400 and "narrator" in refused.json()["error"]["message"]
    roles = {"narrator": "assistant", "customer": "user", "agent": "assistant"}
    made = api.post(f"{path}/fixes", json={"roles": roles}).json()
    new = read(session, session.get(Dataset, ids.parse(ids.DATASET, made["id"])))
    assert [message["role"] for message in rows_of(new, data_dir)[11]["messages"]] == ["user", "assistant", "user", "assistant"]
    assert new.good_rows == 12 and versions.describe(new).startswith("Changed roles: ") and not datasets.unknown_roles(new)
    assert new.report["reason"] == parent.report["reason"], "as in the version before"


@pytest.mark.parametrize(
    ("text", "rule", "wanted"),
    [
        ("ding\x07dong", "control_character", "dingdong"),
        ("one <|im_end|> two", "template_marker", "one  two"),
        ("write to anna.berg@hafen.de now", "personal_data", "write to [e-mail address] now"),
        ("key sk-proj-abcdefghijklmnopqrstuvwx1234", "secret", "key [API key]"),
    ],
)
def test_texts_are_cleaned(session, user, make, data_dir, text, rule, wanted):
    parent = make([*some(10), chat(("user", "a"), ("assistant", text))])
    new = read(session, versions.fix_all(session, user, parent, rule).dataset)
    assert rows_of(new, data_dir)[11]["messages"][1]["content"] == wanted
    assert rule not in {entry["rule"] for entry in datasets.rules(new)}


def test_a_fix_reaches_findings_that_are_not_listed(session, user, make, monkeypatch):
    parent = make(some(3) + [GOOD.replace("{}", "the same")] * 5500)
    assert len(session.query(Finding.id).filter_by(dataset_id=parent.id, rule="duplicate").all()) == 5000
    new = read(session, versions.fix_all(session, user, parent, "duplicate").dataset)
    assert new.good_rows == 4 and "duplicate" not in {entry["rule"] for entry in datasets.rules(new)}


def test_edits_add_up_over_versions_and_lines_keep_their_numbers(session, user, make, data_dir):
    first = make([*some(10), chat(("customer", "a"), ("assistant", "b"))])
    second = read(session, versions.drop_rows(session, user, first, [1, 2, 2]))
    third = read(session, versions.fix_all(session, user, second, "wrong_role").dataset)
    row = {"messages": [{"role": "user", "content": "new"}, {"role": "assistant", "content": "answer"}]}
    fourth = read(session, versions.edit_row(session, user, third, 5, json.dumps(row)))
    rows = rows_of(fourth, data_dir)
    assert list(rows) == [3, 4, 5, 6, 7, 8, 9, 10, 11] and rows[5] == row
    assert [v.version for v in datasets.versions(session, first)] == [1, 2, 3, 4]
    assert rows_of(first, data_dir)[5] != row
    assert [versions.describe(v) for v in (second, fourth)] == ["Removed 2 rows", "Edited line 5"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not valid JSON"),
        ("[]", "object"),
        ('{"messages": []}', "no message"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "no trainable tokens"),
    ],
)
def test_a_typed_row_is_checked_before_anything_is_made(session, user, make, text, words):
    dataset = make(some(10))
    with pytest.raises(BadField, match=words):
        versions.edit_row(session, user, dataset, 1, text)


def test_what_cannot_be_fixed_says_so(session, user, make):
    dataset = make([*some(10), "{broken"])
    (broken,), _ = datasets.findings(session, dataset, rule="invalid_json")
    with pytest.raises(BadField, match="None of the selected"):
        versions.fix_some(session, user, dataset, [broken.id])
    with pytest.raises(BadField, match="No automatic fix"):
        versions.fix_all(session, user, dataset, "duplicate")
    files.delete(session, user, dataset.file_id)
    with pytest.raises(Conflict, match="deleted"):
        versions.drop_rows(session, user, dataset, [1])


def test_rows_of_every_shape_can_be_typed(session, user):
    for entry in formats.FORMATS.values():
        mapping = entry.guess_mapping(list(entry.example))
        row = entry.normalise(entry.example, mapping)
        assert not [f for f in edits.check_normalised(row, entry.shape) if f.severity == "error"], entry.name


def test_rows_on_one_line_have_numbers_of_their_own(session, user, make, data_dir):
    rows = [json.loads(line) for line in some(10)]
    parent = make(json.dumps(rows), "x.json")
    new = read(session, versions.drop_rows(session, user, parent, [2]))
    assert list(rows_of(new, data_dir)) == [1, 3, 4, 5, 6, 7, 8, 9, 10]


def test_findings_taken_away_hold_no_formula(session, make, client):
    dataset = make([*some(10), json.dumps({"messages": [{"role": "=1+1", "content": "a"}]})])
    key = ids.public(ids.DATASET, dataset.id)
    answer = client.get(f"/datasets/{key}/findings.csv")
    assert "attachment" in answer.headers["content-disposition"]
    rows = list(csv.DictReader(io.StringIO(answer.text)))
    assert [row["value"] for row in rows if row["rule"] == "wrong_role"] == ["'=1+1"]
    lines = [json.loads(line) for line in client.get(f"/datasets/{key}/findings.jsonl").text.splitlines()]
    assert lines[0]["value"] == "'=1+1" or lines[0]["value"] == "=1+1"
    assert [findings_export.guarded(cell) for cell in ("+1", "@a", 3, "-x", "a")] == ["'+1", "'@a", 3, "'-x", "a"]


def test_a_click_on_the_page_makes_the_version(session, make, client):
    dataset = make([*some(10), chat(("customer", "a"), ("assistant", "b"))])
    path = f"/datasets/{ids.public(ids.DATASET, dataset.id)}"
    assert "Fix all 1" in client.get(path + "?tab=issues&rule=wrong_role").text
    answer = client.post(path + "/fix", data={"all_of": "wrong_role"}, follow_redirects=False)
    assert answer.status_code == 303
    new = session.get(type(dataset), ids.parse(ids.DATASET, answer.headers["location"].rsplit("/", 1)[1]))
    assert read(session, new).good_rows == 11
    assert "Fixed invalid role in 1 row" in client.get(answer.headers["location"]).text
    assert client.post(path + "/fix", data={}).status_code == 400
    assert client.post(path + "/drop", data={"line": ["1", "2"]}, follow_redirects=False).status_code == 303


def test_what_has_a_fix_is_fixed_and_the_rest_is_listed(session, make, client, api):
    dataset = make([*some(10), "{broken", chat(("customer", "a"), ("assistant", "b"))])
    found = {one.rule: one for one in datasets.findings(session, dataset)[0]}
    path = f"/datasets/{ids.public(ids.DATASET, dataset.id)}"
    boxes = set(re.findall(r'name="finding" value="(\d+)"[^>]*aria-label', client.get(path + "?tab=issues").text))
    assert boxes == {str(one.id) for one in found.values() if one.fix}, "only what can be fixed has a box"
    answer = client.post(path + "/fix", data={"finding": [one.id for one in found.values()]}, follow_redirects=False)
    new = read(session, session.get(type(dataset), ids.parse(ids.DATASET, answer.headers["location"].rsplit("/", 1)[1])))
    assert new.good_rows == 11
    page = client.get(answer.headers["location"] + "?tab=issues").text
    assert "1 issue could not be fixed automatically" in page and "No automatic fix" in page and "/rows/11" in page
    told = api.post(f"/v1{path}/fixes", json={"findings": [one.id for one in found.values()]}).json()
    assert (told["fixed"], [(one["line"], one["rule"]) for one in told["unfixed"]]) == (1, [(11, "invalid_json")])
    assert api.post(f"/v1{path}/fixes", json={"finding": found["invalid_json"].id}).status_code == 400


def test_what_is_ticked_stays_so_after_an_error(session, user, make, client):
    dataset = make([*some(10), chat(("customer", "a"), ("assistant", "b"))])
    (found,), _ = datasets.findings(session, dataset, rule="wrong_role")
    files.delete(session, user, dataset.file_id)
    session.commit()
    path = f"/datasets/{ids.public(ids.DATASET, dataset.id)}/fix"
    answer = client.post(path, data={"finding": [found.id], "rule": "wrong_role", "page": "1"})
    assert answer.status_code == 409 and "was deleted" in answer.text and "Fix all 1" in answer.text
    assert re.search(rf'value="{found.id}" checked', answer.text)
    assert client.post(path, data={}).status_code == 400 and versions.next_number(session, dataset) == 2


BROKEN = {
    "duplicate_key": ('{"prompt": "a", "prompt": "p", "completion": "c"}', {"prompt": "p", "completion": "c"}),
    "not_a_number": ('{"prompt": "p", "completion": "c", "score": NaN}', {"prompt": "p", "completion": "c", "metadata": {"score": None}}),
    "lone_surrogate": ('{"prompt": "p", "completion": "c \\ud83d"}', {"prompt": "p", "completion": "c �"}),
    "invalid_json": ("{'prompt': 'p', 'completion': 'c', }", {"prompt": "p", "completion": "c"}),
}


@pytest.mark.parametrize("rule", BROKEN)
def test_a_line_that_cannot_be_read_is_repaired_by_click(session, user, make, data_dir, rule):
    line, wanted = BROKEN[rule]
    rows = [json.dumps({"prompt": f"p {n}", "completion": "c"}) for n in range(10)]
    parent = make([*rows, line, *rows[:1]])
    (found,), _ = datasets.findings(session, parent, rule=rule)
    assert (found.line, found.fix["operation"]) == (11, "repair") and parent.good_rows == 11
    new = read(session, versions.fix_some(session, user, parent, [found.id]).dataset)
    assert rows_of(new, data_dir)[11] == wanted and new.good_rows == 12
    assert rule not in {entry["rule"] for entry in datasets.rules(new)}
    edited = read(session, versions.drop_rows(session, user, new, [1]))
    assert rows_of(edited, data_dir)[11] == wanted


@pytest.mark.parametrize("name", ["x.jsonl", "x.csv", "x.txt"])
def test_lines_of_another_encoding_are_read_as_windows_wrote_them(session, user, data_dir, name):
    lines = {
        "x.jsonl": [json.dumps({"text": f"Passage {n} über", "label": str(n % 2)}, ensure_ascii=False) for n in range(12)],
        "x.csv": ["text,label", *(f"Passage {n} über,{n % 2}" for n in range(12))],
        "x.txt": [f"Passage {n} über" for n in range(12)],
    }[name]
    data = b"\n".join(line.encode("cp1252" if n in (3, 7) else "utf-8") for n, line in enumerate(lines))
    parent = datasets.create(session, user, files.add_bytes(session, user, data, name, "fine-tune"))
    assert read(session, parent).good_rows == 10
    new = read(session, versions.fix_all(session, user, parent, "not_utf8").dataset)
    assert new.good_rows == 12 and {row["text"] for row in rows_of(new, data_dir).values()} == {f"Passage {n} über" for n in range(12)}


def test_a_file_none_of_whose_lines_can_be_read_is_read_as_it_was_meant(session, user, client, data_dir):
    data = "\n".join(json.dumps({"text": f"Grüße {n}", "label": str(n % 2)}, ensure_ascii=False) for n in range(12)).encode("cp1252")
    wrong = datasets.create(session, user, files.add_bytes(session, user, data, "x.jsonl", "fine-tune"))
    session.commit()
    ingest_task.read(wrong.id)
    session.expire_all()
    assert (wrong.status, wrong.error["rule"], wrong.error["line"], wrong.error["file"]) == ("error", "not_utf8", 1, "x.jsonl")
    path = f"/datasets/{ids.public(ids.DATASET, wrong.id)}"
    assert "Read the line as Windows-1252, and so with every line" in client.get(path).text
    answer = client.post(path + "/repair", follow_redirects=False)
    new = session.get(type(wrong), ids.parse(ids.DATASET, answer.headers["location"].rsplit("/", 1)[1]))
    assert read(session, new).good_rows == 12 and rows_of(new, data_dir)[1]["text"] == "Grüße 0"
    mended = read(session, versions.drop_rows(session, user, new, [1]))
    assert rows_of(mended, data_dir)[2]["text"] == "Grüße 1" and mended.format == "classification"
    with pytest.raises(Conflict, match="nothing to repair"):
        versions.repair(session, user, new)
