"""The pages of the data room as a browser without scripts sees them."""

import html
import re

import pytest
import yaml
from sqlalchemy import select

from app import formats
from app.datasets import ingest_task, samples
from app.datasets import service as datasets
from app.jobs import config_file
from app.kit import ids
from app.storage import files
from app.tables import Dataset, Job, User

CHAT = '{"messages": [{"role": "user", "content": "<b>ask</b>"}, {"role": "assistant", "content": "tell"}]}\n'
BAD = '{"messages": [{"role": "customer", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'


def upload(client, name="talk.jsonl", data=CHAT * 12 + BAD + "{broken\n", **fields):
    return client.post("/datasets", data=fields, files={"file": (name, data)}, follow_redirects=False)


def read(session, answer):
    assert answer.status_code == 303, answer.text
    key = ids.parse(ids.DATASET, answer.headers["location"].rsplit("/", 1)[1])
    ingest_task.read(key)
    session.expire_all()
    return answer.headers["location"]


def test_an_empty_list_says_how_to_fill_it(client):
    page = client.get("/datasets").text
    assert "No dataset yet" in page and 'href="/datasets/new"' in page and "Support replies" in page


def test_upload_then_reading_then_the_report(client, session):
    answer = upload(client)
    waiting = client.get(answer.headers["location"]).text
    assert 'id="reading"' in waiting and "<progress" in waiting
    assert client.get(answer.headers["location"] + "/state").json() == {"status": "reading", "progress": None, "so_far": ""}
    path = read(session, answer)
    page = client.get(path).text
    assert "Detected format: Chat" in page and "invalid role" in page and "12 of 14 rows usable" in page and "invalid JSON" in page
    assert "&lt;b&gt;ask&lt;/b&gt;" in page and "<b>ask" not in page
    assert f"/jobs/new?dataset={path.rsplit('/', 1)[1]}" in page
    only = client.get(path + "?tab=issues&rule=wrong_role&sort=severity").text
    table = only[only.index('id="findings"') :]
    assert "Change to “user”" in table and "Not valid JSON" not in table
    assert client.get(path + "?tab=issues&sort=colour").status_code == 400
    assert "talk" in client.get("/datasets").text


def test_overruling_makes_a_new_version_and_leaves_the_old_one(client, session):
    path = read(session, upload(client, "pairs.csv", "question,answer,note\nq1,a1,x\nq2,a2,y\n"))
    assert "Detected format: Instruction" in client.get(path).text
    form = {"format": "completion", "map.completion.prompt": "answer", "map.completion.completion": "question"}
    second = read(session, client.post(path + "/read", data=form, follow_redirects=False))
    assert second != path
    page = client.get(second).text
    assert "Format: Completion" in page and "Chosen by you" in page
    old, new = session.scalars(select(Dataset).order_by(Dataset.version)).all()
    assert (old.format, new.format, new.version, new.parent_id) == ("instruction", "completion", 2, old.id)
    assert datasets.preview(new)[0] == {"prompt": "a1", "completion": "q1", "metadata": {"note": "x"}}
    assert "Re-mapped" in client.get(path + "?tab=versions").text


def test_a_file_no_format_fits_says_so_and_offers_the_columns(client, session):
    path = read(session, upload(client, "odd.csv", "alpha,beta\n1,2\n"))
    page = client.get(path).text
    assert "“alpha”" in page and "could not match the columns" in page and "Map the columns" in page


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("x.jsonl", b"", "empty"),
        ("x.exe", b"MZ", "not supported"),
        ("", b"x", "No file"),
    ],
)
def test_a_refused_upload_says_why(client, session, data_dir, name, data, words):
    answer = client.post(
        "/datasets", files={"file": (name, data)} if name else {"other": ("a", b"x")}, headers={"accept": "application/json"}
    )
    assert answer.status_code in (400, 415)
    assert words in answer.json()["error"]["message"]
    assert session.scalars(select(Dataset)).all() == []
    assert not [path for path in (data_dir / "blobs").glob("*/*")]


@pytest.mark.long
def test_every_sample_is_good_in_every_row_and_is_what_the_index_says(client, session):
    for sample in samples.list_():
        path = read(session, client.post(f"/datasets/samples/{sample['name']}", follow_redirects=False))
        dataset = session.get(Dataset, ids.parse(ids.DATASET, path.rsplit("/", 1)[1]))
        assert (dataset.status, dataset.format) == ("ready", sample["format"]), dataset.error
        assert dataset.rows == dataset.good_rows == sample["rows"]
        assert not [rule for rule in datasets.rules(dataset) if rule["severity"] != "note"], datasets.rules(dataset)
        assert sample["shows"].endswith(".") and sample["format"] in formats.FORMATS
        page = client.get(path)
        assert page.status_code == 200 and "StrictUndefined" not in page.text
        assert not any(prompt in page.text for prompt in sample.get("held_out", []))
    assert client.post("/datasets/samples/nothing").status_code == 404


def test_a_sample_is_added_once_and_the_page_says_that_it_is_there(client, session):
    path = read(session, client.post("/datasets/samples/support-replies", follow_redirects=False))
    page = client.get("/datasets").text
    assert f'href="{path}" aria-label="Added: Support replies (chat)"' in page and page.count("Added ✓") == 1
    assert client.post("/datasets/samples/support-replies", follow_redirects=False).headers["location"] == path
    assert len(session.scalars(select(Dataset)).all()) == 1


def test_two_datasets_of_one_name_are_told_apart(client):
    upload(client, "talk.jsonl")
    assert "talk.jsonl" not in client.get("/datasets").text
    upload(client, "talk.jsonl")
    page = client.get("/datasets").text
    assert page.count("talk.jsonl <time") == 2


@pytest.mark.parametrize(
    ("text", "extension", "columns"),
    [
        ("Frage\tKategorie\r\nWo, bitte?\tKonto\r\n", ".tsv", ["Frage", "Kategorie"]),
        ("Frage;Kategorie\nWo?;Konto", ".csv", ["Frage", "Kategorie"]),
        ("Frage\nWo, bitte?\nUnd wann?", ".tsv", ["Frage"]),
        ('{"Frage": "Wo?"}\n{"Frage": "Wann?"}', ".jsonl", ["Frage"]),
        ('[{"Frage": "Wo?"},\n{"Frage": "Wann?"}]', ".json", ["Frage"]),
    ],
)
def test_a_pasted_table_becomes_a_file(client, session, text, extension, columns):
    read(session, client.post("/datasets/paste", data={"text": text, "name": "Fragen"}, follow_redirects=False))
    dataset = session.scalars(select(Dataset)).one()
    assert dataset.origin["filename"] == f"pasted{extension}" and dataset.name == "Fragen"
    assert dataset.error["columns"] == columns and dataset.error["preview"]


@pytest.mark.long
def test_what_is_no_table_is_not_pasted(client, session):
    for text, status in (("", 400), ("only,names", 400), ("a\n" * 2_500_001, 413)):
        answer = client.post("/datasets/paste", data={"text": text})
        assert answer.status_code == status and ("at least one row" in answer.text or "Upload it as a file" in answer.text)
    assert session.scalars(select(Dataset)).all() == []


def test_deleting_takes_the_rows_away(client, session, data_dir):
    path = read(session, upload(client))
    assert list((data_dir / "rows").glob("*/*.parquet"))
    assert client.post(path + "/delete", follow_redirects=False).status_code == 303
    assert not list((data_dir / "rows").glob("*/*"))
    assert client.get(path).status_code == 404


def test_another_persons_dataset_is_not_there(client, session):
    other = User(name="other")
    session.add(other)
    session.flush()
    dataset = datasets.create(session, other, files.add_bytes(session, other, CHAT.encode(), "x.jsonl", "fine-tune"))
    session.commit()
    path = f"/datasets/{ids.public(ids.DATASET, dataset.id)}"
    for method, tail in (("GET", ""), ("GET", "/state"), ("POST", "/read"), ("POST", "/retry"), ("POST", "/delete")):
        data = {"format": "chat"} if method == "POST" else None
        assert client.request(method, path + tail, data=data).status_code == 404


def test_no_page_has_inline_scripts_or_styles(client, session):
    path = read(session, upload(client))
    for address in ("/datasets", "/datasets/new", path):
        page = client.get(address).text
        assert not re.search(r"<[^>]+\s(style|on\w+)=", page)


def test_strings_for_new_tokens_lead_to_a_run_with_them(client, session, tiny_registered):
    row = '{{"messages": [{{"role": "user", "content": "{}?"}}, {{"role": "assistant", "content": "By <photosynthesis> it grows."}}]}}\n'
    path = read(session, upload(client, data="".join(row.format(n) for n in range(20))))
    key = path.rsplit("/", 1)[1]
    found = client.get(f"/v1/datasets/{key}/report").json()["new_tokens"]
    assert found[0]["text"] == "<photosynthesis>" and found[0]["count"] == 20 and found[0]["saved"] > 40
    page = client.get(path).text
    assert "by the tokens that tiny would save" in page and "&lt;photosynthesis&gt;" in page
    link = html.unescape(re.search(r'href="(/jobs/new\?[^"]*run.new_tokens=[^"]*)"', page)[1])
    form = client.get(link).text
    typed = re.search(r'<textarea[^>]*name="run.new_tokens"[^>]*>([^<]*)</textarea>', form)[1]
    assert html.unescape(typed).splitlines()[0] == "<photosynthesis>"
    sent = {"model": "tiny", "dataset": key, "strategy": "lora", "run.new_tokens": "<photosynthesis>\n\n  \n", "run.samples": "0"}
    answer = client.post("/jobs", data=sent, follow_redirects=False)
    assert answer.status_code == 303, answer.text
    job = session.scalars(select(Job)).one()
    assert job.spec["run"]["new_tokens"] == ["<photosynthesis>"]
    config = config_file.of_job(job)
    assert "  new_tokens:\n  - <photosynthesis>\n" in config
    assert yaml.safe_load(config)["run"]["new_tokens"] == ["<photosynthesis>"]
    again = client.get(f"/jobs/new?clone={ids.public(ids.JOB, job.id)}").text
    assert "&lt;photosynthesis&gt;</textarea>" in again
    refused = client.post("/jobs", data={**sent, "run.new_tokens": "<|tool|>"}, follow_redirects=False)
    assert refused.status_code == 400 and "form of a special token" in refused.text
