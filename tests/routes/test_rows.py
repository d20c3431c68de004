"""The page of rows: tokens with their mask, search, lengths, losses, and the editor of one row."""

import json
import re
import time

import pytest
from sqlalchemy import select

from app.datasets import ingest_task
from app.datasets import service as datasets
from app.kit import ids
from app.storage import files
from app.tables import Dataset, Event, Job
from tests.data_worker import data_worker

ASK = "What wood is the belly number {} made of?"


def lines(count):
    rows = [
        {"messages": [{"role": "user", "content": ASK.format(n)}, {"role": "assistant", "content": "It is made of <b>spruce</b>."}]}
        for n in range(count)
    ]
    return "\n".join(json.dumps(row) for row in rows)


@pytest.fixture
def worker(session):
    with data_worker():
        yield


@pytest.fixture
def dataset(session, user):
    made = datasets.create(session, user, files.add_bytes(session, user, lines(25).encode(), "x.jsonl", "fine-tune"))
    session.commit()
    ingest_task.read(made.id)
    session.expire_all()
    return made


@pytest.fixture
def path(dataset):
    return f"/datasets/{ids.public(ids.DATASET, dataset.id)}"


def until_ready(client, address):
    for _ in range(40):
        page = client.get(address)
        assert page.status_code == 200, page.text
        if "js/refresh.js" not in page.text.split("</head>")[0]:
            return page.text
    raise AssertionError("never ready")


@pytest.mark.long
def test_rows_are_shown_token_by_token_with_their_mask(client, tiny_registered, dataset, path, worker):
    page = until_ready(client, path + "/rows?cutoff=128")
    assert "25 rows" in page and 'class="t1"' in page and 'class="t0"' in page
    first = re.search(r'aria-label="Tokens of line 1">(.*?)</div>', page, re.DOTALL)[1]
    learnt = "".join(re.findall(r'<span class="t1">(.*?)</span>', first, re.DOTALL))
    assert learnt == "It is made of &lt;b&gt;spruce&lt;/b&gt;.&lt;|im_end|&gt;"
    assert "Rows truncated at 128" in page and 'class="lengths"' in page
    turns = until_ready(client, path + "/rows?cutoff=128&train_on=all_turns")
    everything = re.search(r'aria-label="Tokens of line 1">(.*?)</div>', turns, re.DOTALL)[1]
    assert everything.count('class="t0"') == 1 and "train_on=all_turns" in turns.split('aria-label="Tokens')[-1]
    assert '<option value="all_turns" selected>all turns' in turns
    assert "Line 11" in until_ready(client, path + "/rows?page=2")
    assert "1 row" in until_ready(client, path + "/rows?search=number+17+made")
    assert 'class="t2"' in until_ready(client, path + "/rows?cutoff=16").split("</header>")[-1].split('id="rows"')[1].split("</p>", 1)[1]


def test_without_a_model_the_rows_are_shown_all_the_same(client, dataset, path, worker):
    page = until_ready(client, path + "/rows")
    assert "25 rows" in page and "number 3 made" in page and "Once a model is available" in page


@pytest.mark.long
def test_long_rows_are_cut_on_the_page_and_whole_in_their_editor(client, session, user, tiny_registered, worker):
    long = [json.loads(line) for line in lines(10).splitlines()]
    for row in long:
        row["messages"][1]["content"] = "spruce " * 70_000
    made = datasets.create(session, user, files.add_bytes(session, user, "\n".join(map(json.dumps, long)).encode(), "x.jsonl", "fine-tune"))
    session.commit()
    ingest_task.read(made.id)
    path = f"/datasets/{ids.public(ids.DATASET, made.id)}/rows"
    page = until_ready(client, path)
    assert "10 rows" in page and "Tokens of line 10" in page
    assert len(client.get(path + "/10").text) > 490_000


@pytest.mark.long
def test_a_row_is_edited_in_fields_or_as_json_into_a_new_version(client, session, dataset, path, worker):
    page = client.get(path + "/rows/3").text
    assert "number 2 made" in page and 'name="text.messages[1]"' in page
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    fields = {"row": json.dumps(row), "text.messages[1]": "better\r\nanswer", "role.messages[0]": "user"}
    answer = client.post(path + "/rows/3", data=fields, follow_redirects=False)
    assert answer.status_code == 303, answer.text
    new = session.scalars(select(Dataset).where(Dataset.version == 2)).one()
    assert new.edits == [
        {
            "operation": "replace",
            "lines": [3],
            "row": {"messages": [row["messages"][0], {"role": "assistant", "content": "better\nanswer"}]},
        }
    ]
    assert "Edited line 3" in client.get(answer.headers["location"]).text
    wrong = client.post(path + "/rows/3", data={"row": json.dumps(row), "text.messages[1]": ""})
    assert wrong.status_code == 400 and "no trainable tokens" in wrong.text
    assert client.post(path + "/rows/3", data={"row": "{", "do": "json"}).status_code == 400
    assert client.post(path + "/rows/3", data={"row": "", "do": "drop"}, follow_redirects=False).status_code == 303
    assert client.get(path + "/rows/999").status_code == 404


@pytest.mark.long
def test_a_line_that_cannot_be_read_is_mended_by_hand(client, api, session, user, worker):
    data = lines(12) + '\n{"messages": [{"role": "user", "content": "<i>a"}\n' + lines(1).replace('"user"', '"customer"')
    dataset = datasets.create(session, user, files.add_bytes(session, user, data.encode(), "x.jsonl", "fine-tune"))
    session.commit()
    ingest_task.read(dataset.id)
    session.expire_all()
    key = ids.public(ids.DATASET, dataset.id)
    path = f"/datasets/{key}"
    report = client.get(path + "?tab=issues&severity=error").text
    assert f'href="{path}/rows/13"' in report and f'href="{path}/rows/14"' in report
    page = client.get(path + "/rows/13").text
    assert "&lt;i&gt;a" in page and "invalid JSON" in page and "Remove row" in page
    other = client.get(path + "/rows/14").text
    assert "customer" in other and "Change to “user”" in other
    assert client.get(path + "/rows/15").status_code == 404

    typed = {"do": "raw", "row": '{"messages": [{"role": "user", "content": "a"}]}'}
    refused = client.post(path + "/rows/13", data=typed)
    assert refused.status_code == 400 and "no trainable tokens" in refused.text and "&#34;content&#34;: &#34;a&#34;" in refused.text
    assert client.post(path + "/rows/13", data={"do": "raw", "row": '{"a": NaN}'}).status_code == 400
    typed["row"] = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'
    assert client.post(path + "/rows/13", data=typed, follow_redirects=False).status_code == 303
    new = session.scalars(select(Dataset).where(Dataset.version == 2)).one()
    for _ in range(100):
        session.expire_all()
        if new.status != "reading":
            break
        time.sleep(0.1)
    assert (new.status, new.good_rows, dataset.good_rows) == ("ready", 13, 12)
    line = api.get(f"/v1/datasets/{ids.public(ids.DATASET, new.id)}/lines/13").json()
    assert json.loads(line["text"])["messages"][1]["content"] == "b" and not line["problems"]
    ticked = [found["id"] for found in api.get(f"/v1/datasets/{key}/report").json()["findings"] if found["fix"] and found["line"] == 14]
    answer = client.post(path + "/fix", data={"finding": ticked, "do": "drop"}, follow_redirects=False)
    assert answer.status_code == 303
    assert session.scalars(select(Dataset).where(Dataset.version == 3)).one().edits == [{"operation": "drop_row", "lines": [14]}]


@pytest.mark.long
def test_the_ledger_sorts_the_rows(client, session, user, dataset, path, tiny_registered, worker, data_dir):
    job = Job(owner_id=user.id, name="judge", status="succeeded", spec={}, model_id=tiny_registered.id, dataset_id=dataset.id)
    session.add(job)
    session.flush()
    session.add(Event(job_id=job.id, attempt=1, type="finished", data={"path": f"runs/{job.id}/a1/final"}))
    session.commit()
    folder = data_dir / "runs" / str(job.id) / "a1"
    (folder / "final").mkdir(parents=True)
    ledger = {"line": [1, 2, 3], "before": [3.0, 3.5, 3.2], "after": [0.4, 2.75, 3.3], "tokens": [8, 8, 8]}
    (folder / "ledger.json").write_text(json.dumps(ledger))
    page = until_ready(client, path + "/rows?sort=after")
    assert [int(n) for n in re.findall(r'name="line" value="(\d+)"', page)] == [3, 2, 1]
    assert "2.750" in page and "for 1 row the loss increased" in page and "Clone the run" in page
    assert [int(n) for n in re.findall(r'name="line" value="(\d+)"', until_ready(client, path + "/rows?sort=before"))] == [2, 3, 1]
    assert client.get(path + "/rows?sort=colour").status_code == 400


@pytest.mark.long
def test_programs_get_the_same_rows(api, dataset, tiny_registered, worker):
    key = ids.public(ids.DATASET, dataset.id)
    for _ in range(20):
        answer = api.get(f"/v1/datasets/{key}/rows?search=number 7").json()
        if answer["status"] == "ready" and answer["lengths"]:
            break
    assert answer["matches"] == 1 and answer["data"][0]["line"] == 8 and answer["data"][0]["tokens"]
    assert answer["lengths"]["rows"] == 25 and answer["model"] == "tiny" and answer["cutoff"] <= 1024
    for _ in range(20):
        ranked = api.get(f"/v1/datasets/{key}/rows?sort=longest").json()
        if ranked["status"] == "ready":
            break
    totals = [row["total"] for row in ranked["data"]]
    assert totals == sorted(totals, reverse=True) and totals[0] == answer["lengths"]["longest"] and ranked["has_more"]
    assert [row["line"] for row in ranked["data"]] == [line for line, _ in answer["lengths"]["longest_rows"]][:10]
    assert api.get(f"/v1/datasets/{key}/rows?sort=colour").status_code == 400
