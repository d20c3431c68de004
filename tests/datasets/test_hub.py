"""Datasets of the hub, against a real HTTP server that speaks as the hub does."""

import hashlib
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from app.datasets import hub as hub_datasets
from app.datasets import ingest_task
from app.errors import BadData, BadField, TooLarge, Unavailable
from app.kit import ids
from app.tables import Dataset, File
from tests.datasets.malformed import GOOD

SHA = "c" * 40


def parquet(rows):
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), out)
    return out.getvalue()


PIECES = [[{"prompt": f"p {k} {n}", "completion": f"c {n}"} for n in range(10)] for k in range(2)]
REPOS = {
    "luthier/talk": {"README.md": b"x", "data/train.jsonl": "\n".join(GOOD).encode(), "data/test.jsonl": b"{}", "evil.py": b"import os"},
    "luthier/pieces": {f"data/train-0000{k}-of-00002.parquet": parquet(PIECES[k]) for k in range(2)},
    "luthier/scripts": {"loader.py": b"import os"},
    "luthier/levels": {
        f"{level}/{split}-00000-of-00001.parquet": parquet(PIECES[level == "hard"][:9])
        for level in ("easy", "hard")
        for split in ("train", "test")
    },
}


class Hub(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        path = self.path.partition("?")[0]
        if path.startswith("/api/datasets/"):
            repo = "/".join(path.split("/")[3:5])
            if repo not in REPOS:
                return self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, body)
            siblings = [{"rfilename": name, "size": len(data)} for name, data in REPOS[repo].items()]
            facts = {"id": repo, "sha": SHA, "siblings": siblings, "cardData": {"license": "cc0-1.0"}}
            return self.send(200, json.dumps(facts).encode(), {"content-type": "application/json"}, body)
        _, _, owner, name, _, sha, *rest = path.split("/")
        data = REPOS[f"{owner}/{name}"]["/".join(rest)]
        assert sha == SHA, "the commit is pinned"
        return self.send(200, data, {"etag": f'"{hashlib.sha256(data).hexdigest()}"', "x-repo-commit": SHA}, body)

    def send(self, status, data, headers, body):
        self.send_response(status)
        for key, value in {**headers, "content-length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *rest):
        pass


@pytest.fixture
def hub(session, monkeypatch):
    from app.settings import get_settings

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(get_settings(), "offline", False)
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    yield server
    server.shutdown()


def bring(session, user, **wish):
    dataset = hub_datasets.order(session, user, hub_datasets.HubOrder(**wish))
    session.commit()
    ingest_task.read(dataset.id)
    session.expire_all()
    return dataset


def test_a_split_becomes_a_dataset_with_its_commit(session, user, hub, data_dir):
    dataset = bring(session, user, repo="luthier/talk")
    assert (dataset.status, dataset.format, dataset.good_rows, dataset.name) == ("ready", "chat", 12, "talk"), dataset.error
    assert dataset.origin["revision"] == SHA and dataset.origin["license"] == "cc0-1.0"
    file = session.get(File, dataset.file_id)
    assert (file.filename, file.status) == ("train.jsonl", "processed") and not list((data_dir / "tmp").glob("bring-*"))


def test_a_subset_is_chosen_by_its_name(session, user, hub):
    dataset = bring(session, user, repo="luthier/levels", subset="hard", split="test")
    assert (dataset.status, dataset.good_rows) == ("ready", 9), dataset.error
    assert dataset.report["preview"][0]["row"]["prompt"] == "p 1 0" and dataset.origin["files"] == ["hard/test-00000-of-00001.parquet"]


@pytest.mark.long
def test_pieces_of_a_split_are_put_together(session, user, hub):
    dataset = bring(session, user, repo="luthier/pieces", name="whole")
    assert (dataset.status, dataset.good_rows, dataset.name) == ("ready", 20, "whole"), dataset.error
    assert [item["row"]["prompt"] for item in dataset.report["preview"]][9:11] == ["p 0 9", "p 1 0"]


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        ({"repo": "luthier/nothing"}, "no dataset luthier/nothing"),
        ({"repo": "luthier/talk", "split": "validation"}, "no file for the split"),
        ({"repo": "luthier/scripts"}, "no file for the split"),
        ({"repo": "luthier/talk", "file": "evil.py"}, "no data file"),
    ],
)
def test_what_is_not_there_is_said_with_what_there_is(session, user, hub, wish, words):
    dataset = bring(session, user, **wish)
    assert dataset.status == "error" and words in dataset.error["message"] and dataset.error["hint"]


def test_away_or_offline_it_says_so(session, user, monkeypatch, hub):
    from app.settings import get_settings

    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert bring(session, user, repo="luthier/talk").error["message"].startswith("The hub cannot be reached")
    monkeypatch.setattr(get_settings(), "offline", True)
    with pytest.raises(Unavailable, match="offline"):
        hub_datasets.order(session, user, hub_datasets.HubOrder(repo="luthier/talk"))
    for repo in ("../x", "http://evil/x", "a/b/c", "", "a b"):
        with pytest.raises(BadField):
            hub_datasets.order(session, user, hub_datasets.HubOrder(repo=repo))


def test_files_are_chosen_by_their_split():
    def choose(names, split="train", file=None, subset=None, configs=None):
        return hub_datasets.choose(dict.fromkeys(names, 10), "a/b", split, file, subset, configs)

    assert choose(["train.csv", "test.csv"]) == ["train.csv"]
    assert choose(["only.parquet", "x.py", ".gitattributes", "README.md"]) == ["only.parquet"]
    assert choose(["de/train.jsonl", "train.jsonl"]) == ["train.jsonl"]
    assert choose(["data/train-00001-of-00002.parquet", "data/train-00000-of-00002.parquet", "data/test-00000-of-00001.parquet"]) == [
        "data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet",
    ]  # fmt: skip
    assert choose(["de/train.jsonl", "fr/train.jsonl"], file="fr/train.jsonl") == ["fr/train.jsonl"]
    with pytest.raises(BadData, match=r"several files.*file: de/train.jsonl"):
        choose(["de/train.jsonl", "fr/train.jsonl"])
    assert choose(["de/train.jsonl", "fr/train.jsonl"], subset="fr") == ["fr/train.jsonl"]
    with pytest.raises(BadData, match="no subset “it”"):
        choose(["de/train.jsonl", "fr/train.jsonl"], subset="it")
    names = ["a/x-0.parquet", "a/x-1.parquet", "a/y.parquet", "b/x.parquet"]
    card = [
        {"config_name": "one", "data_files": [{"split": "train", "path": "a/x-*"}, {"split": "test", "path": ["a/y.parquet"]}]},
        {"config_name": "two", "data_files": "b/*"},
    ]
    assert choose(names, subset="one", configs=card) == names[:2] and choose(names, "test", subset="one", configs=card) == ["a/y.parquet"]
    assert choose(names, subset="two", configs=card) == ["b/x.parquet"] and choose(names, configs=card[:1]) == names[:2]
    with pytest.raises(BadData, match=r"several subsets.*one, two"):
        choose(names, configs=card)
    with pytest.raises(BadData, match="no data file"):
        choose(["../x.jsonl"], file="../x.jsonl")
    with pytest.raises(TooLarge):
        hub_datasets.choose({"train.csv": 10**15}, "a/b", "train", None)


def test_the_form_and_the_api_order_it(session, client, api, hub):
    page = client.get("/datasets/new").text
    assert "Import from Hugging Face" in page
    answer = client.post("/datasets/hub", data={"repo": " luthier/talk "}, follow_redirects=False)
    made = session.get(Dataset, ids.parse(ids.DATASET, answer.headers["location"].rsplit("/", 1)[1]))
    assert made.origin["repo"] == "luthier/talk" and made.status == "reading"
    twin = api.post("/v1/datasets/hub", json={"repo": "luthier/talk", "split": "test"}).json()
    assert twin["status"] == "reading" and twin["origin"]["split"] == "test"
    assert api.post("/v1/datasets/hub", json={"repo": "../x"}).status_code == 400
