"""`/v1/models` as the unmodified client calls it, and the pages around it."""

from __future__ import annotations

import io
import json
import re
import shutil
import zipfile
from pathlib import Path
from urllib.parse import quote

import openai
import pytest
from sqlalchemy import text
from starlette.testclient import TestClient

from app.events import Finished, Measured
from app.kit import ids, manifest
from app.models import service as models
from app.models import starters
from app.shapes import Shape
from app.tables import Job, Model
from tests.card_code import run_card
from tests.conftest import ORIGIN
from tests.factories import make_dataset, make_spec
from tests.models.test_service import tune_by_hand
from tests.web.test_people import made, signed_in

MEASURED = Measured(peak_memory_bytes=1, seconds=1, tokens_per_second=1, tokens=1, trained_tokens=1, steps=1, device="cpu")


@pytest.fixture
def tuned(session, user, tiny_registered, tiny_model, data_dir) -> Model:
    """An adapter on the tiny model, its name with a slash."""
    tiny_registered.name = "lab/tiny"
    session.flush()
    folder = tune_by_hand(data_dir / "runs" / "1" / "final", tiny_model)
    dataset = make_dataset(session, user, data_dir)
    job = Job(
        owner_id=user.id, name="Letters", status="succeeded", spec=make_spec(tiny_registered, dataset).model_dump(mode="json"),
        model_id=tiny_registered.id, dataset_id=dataset.id, order={"suffix": "letters"}, evaluation={"base": {"loss": 2.5}, "tuned": {"loss": 1.25}},
    )  # fmt: skip
    session.add(job)
    session.flush()
    finished = Finished(
        reason="completed",
        step=1,
        path="runs/1/final",
        bytes=9,
        revision=manifest.read(folder)["revision"],
        adapter_sha256="cd" * 32,
        kind="dialogue",
        measured=MEASURED,
    )
    model = models.register_tuned(session, job, finished)
    session.commit()
    return model


def test_the_client_lists_retrieves_and_deletes(openai_client, tuned) -> None:
    found = {model.id: model for model in openai_client.models.list()}
    assert set(found) == {"lab/tiny", tuned.name}
    one = openai_client.models.retrieve(tuned.name)
    assert (one.object, one.owned_by, one.base, one.strategy, one.adapter_sha256) == ("model", "user", "lab/tiny", "lora", "cd" * 32)
    assert one.lineage == ["lab/tiny", tuned.name] and one.parameters == Shape.model_validate(tuned.shape).parameters()
    with pytest.raises(openai.ConflictError) as caught:
        openai_client.models.delete("lab/tiny")
    assert caught.value.code == "model_in_use" and caught.value.response.headers["x-should-retry"] == "false"
    gone = openai_client.models.delete(tuned.name)
    assert gone.deleted and gone.id == tuned.name
    assert openai_client.models.delete("lab/tiny").deleted
    assert openai_client.models.list().data == []


def test_ids_with_slashes_work_raw_and_encoded(api, tuned) -> None:
    for spelled in (tuned.name, quote(tuned.name, safe=""), ids.public(ids.MODEL, tuned.id)):
        answer = api.get(f"/v1/models/{spelled}")
        assert answer.status_code == 200 and answer.json()["id"] == tuned.name, answer.text
    assert api.delete(f"/v1/models/{quote(tuned.name, safe='')}").json() == {"id": tuned.name, "object": "model", "deleted": True}


def test_a_missing_model_is_openais_404(openai_client, tiny_registered) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        openai_client.models.retrieve("gpt-4o")
    assert (caught.value.code, caught.value.param) == ("resource_missing", "model")


def test_a_model_is_ordered_by_the_api(api, session, data_dir, tiny_model) -> None:
    shutil.copytree(tiny_model, data_dir / "import" / "mine")
    answer = api.post("/v1/models", json={"folder": "mine", "name": "lab/mine", "kind": "dialogue"})
    assert (answer.status_code, answer.json()["status"]) == (200, "fetching"), answer.text
    for body, status, param in (
        ({}, 400, "starter"),
        ({"starter": "a", "hub": "b"}, 400, "starter"),
        ({"starter": "nothing"}, 404, "name"),
        ({"starter": "gemma-3-270m"}, 409, "accept_terms"),
        ({"folder": "/etc"}, 403, "path"),
        ({"folder": "mine", "name": "lab/mine"}, 409, "name"),
        ({"folder": "mine", "name": "b", "kind": "magic"}, 400, "kind"),
        ({"hub": "a/b"}, 503, None),
    ):
        answer = api.post("/v1/models", json=body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (status, param), (body, answer.text)


def test_the_pages_show_models_and_lineage(client, session, user, tuned, tiny_registered) -> None:
    page = client.get("/models")
    assert page.status_code == 200 and tuned.name in page.text and "Add SmolLM2 135M Instruct" in page.text
    assert "every 2s" not in page.text, "nothing is being fetched"
    key = ids.public(ids.MODEL, tuned.id)
    said = {
        "use": ("client.chat.completions.create", "new OpenAI({ baseURL:", "curl http", "Create API key"),
        "export": ("PeftModel.from_pretrained", "Download the adapter", "Merge adapter"),
        "lineage": ("Lineage", "Letters", "KV heads"),
        "files": ("cd" * 32,),
        "settings": ("Delete",),
    }
    for tab, words in said.items():
        page = client.get(f"/models/{key}?tab={tab}")
        assert page.status_code == 200 and page.text.count('aria-current="page"') >= 2
        assert [word for word in words if word not in page.text] == []
        others = {word for other, theirs in said.items() if other != tab for word in theirs if word not in ("Delete", "Lineage", "Letters")}
        assert [word for word in others if word in page.text] == [], "a tab shows its own part alone"
    assert client.get(f"/models/{key}?tab=elsewhere").status_code in (400, 422)
    assert "cannot be deleted" in client.get(f"/models/{ids.public(ids.MODEL, tiny_registered.id)}?tab=settings").text
    assert client.get("/models/model-" + "0" * 32).status_code == 404


def test_a_shared_base_tells_nothing_of_other_projects(client, web, session, tuned, tiny_registered) -> None:
    """What was made of it by others, and what of theirs keeps it, is theirs."""
    stranger = signed_in(web, session, made(session, "Ada", "member"))
    key = ids.public(ids.MODEL, tiny_registered.id)
    assert tuned.name in client.get(f"/models/{key}?tab=lineage").text and tuned.name in client.get(f"/models/{key}?tab=settings").text
    for tab in ("lineage", "settings"):
        page = stranger.get(f"/models/{key}?tab={tab}")
        assert page.status_code == 200 and tuned.name not in page.text and tuned.title not in page.text, tab
    assert "an admin can delete it" in page.text and f"/models/{key}/delete" not in page.text


def test_a_key_is_made_where_it_is_used_and_works(client, web, tuned) -> None:
    key = ids.public(ids.MODEL, tuned.id)
    page = client.post(f"/models/{key}/api-key").text
    (made,) = set(re.findall(r"sk-luthier-[0-9a-f]{32}-[\w-]+", page))
    assert page.count(made) == 3, "in Python, JavaScript and curl"
    with TestClient(web.app, base_url=ORIGIN, headers={"authorization": f"Bearer {made}"}) as program:
        assert program.get(f"/v1/models/{tuned.name}").json()["id"] == tuned.name
    assert made not in client.get(f"/models/{key}").text


def test_a_fetch_shows_its_progress_and_a_failed_one_its_hint(client, session, user) -> None:
    row = Model(
        owner_id=user.id, name="slow", title="Slow", kind="generic", status="fetching", progress=0.42, source={"from": "hub", "repo": "a/b"}
    )
    session.add(row)
    session.commit()
    page = client.get("/models").text
    assert 'value="0.4200"' in page and "every 2s" in page
    row.status, row.error = "error", {"code": "x", "message": "The hub cannot be reached.", "hint": "Check <the> network."}
    session.commit()
    page = client.get("/models").text
    assert "The hub cannot be reached." in page and "Check &lt;the&gt; network." in page and "Try again" in page
    key = ids.public(ids.MODEL, row.id)
    assert client.get(f"/models/{key}").status_code == 200
    assert client.post(f"/models/{key}/retry", follow_redirects=False).status_code == 303
    session.refresh(row)
    assert row.status == "fetching"


def test_forms_add_and_keep_what_was_typed(client, session, data_dir, tiny_model) -> None:
    answer = client.post("/models", data={"folder": "nowhere", "name": "x"})
    assert answer.status_code == 400 and "There is no folder" in answer.text and 'value="nowhere"' in answer.text
    answer = client.post("/models", data={"starter": "smollm2-135m-instruct"}, follow_redirects=False)
    assert (answer.status_code, answer.headers["location"]) == (303, "/models")
    assert session.get_one(Model, starters.model_id("smollm2-135m-instruct")).status == "fetching"
    answer = client.post("/models", data={"starter": "gemma-3-270m"}, follow_redirects=False)
    assert answer.headers["location"] == "/models/terms/gemma-3-270m"


def test_the_terms_are_shown_before_they_are_accepted(client, session, data_dir) -> None:
    kept = data_dir / "models" / f".{starters.model_id('gemma-3-270m')}.terms.txt"
    assert client.get("/models/terms/gemma-3-270m").status_code == 503  # offline, and never fetched
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("Last modified\n\nBy using <b>Gemma</b> you agree.\n")
    page = client.get("/models/terms/gemma-3-270m").text
    assert "By using &lt;b&gt;Gemma&lt;/b&gt; you agree." in page and 'name="accept_terms"' in page
    client.post("/models", data={"starter": "gemma-3-270m", "accept_terms": "true"})
    assert session.get_one(Model, starters.model_id("gemma-3-270m")).source["terms_accepted"] is True


def test_an_adapter_downloads_in_the_layout_peft_loads(client, tuned, tiny_model, tmp_path, data_dir) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    answer = client.get(f"/models/{ids.public(ids.MODEL, tuned.id)}/download")
    assert answer.status_code == 200 and answer.headers["content-type"] == "application/zip"
    assert answer.headers["content-disposition"].endswith('.zip"') and "/" not in answer.headers["content-disposition"]
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        assert archive.testzip() is None and all(i.compress_type == zipfile.ZIP_STORED for i in archive.infolist())
        archive.extractall(tmp_path / "got")
    config = json.loads((tmp_path / "got" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "lab/tiny" and str(data_dir) not in json.dumps(config)
    card = (tmp_path / "got" / "README.md").read_text()
    assert "base_model: lab/tiny" in card and "library_name: peft" in card and "validation loss, tuned | 1.25" in card
    model = run_card(card, tmp_path / "got", **{"lab/tiny": tiny_model})["model"].float()
    ours = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32), str(data_dir / "runs/1/final"))
    trial = torch.tensor([[5, 6, 7]])
    assert torch.equal(model(trial).logits, ours(trial).logits)


def test_another_persons_model_is_hidden_from_every_door(client, session, tuned) -> None:
    session.execute(text("INSERT INTO users (id, name) VALUES (gen_random_uuid(), 'other')"))
    session.execute(text("INSERT INTO projects (id, name, personal) SELECT id, name, true FROM users WHERE name = 'other'"))
    session.execute(
        text("UPDATE models SET owner_id = p.id, project_id = p.id FROM projects p WHERE p.name = 'other' AND job_id IS NOT NULL")
    )
    session.commit()
    key = ids.public(ids.MODEL, tuned.id)
    for method, path in (
        ("GET", f"/v1/models/{tuned.name}"), ("DELETE", f"/v1/models/{tuned.name}"), ("GET", f"/models/{key}"), ("GET", f"/models/{key}/download"),
        ("POST", f"/models/{key}/delete"), ("POST", f"/models/{key}/merge"), ("POST", f"/models/{key}/retry"),
    ):  # fmt: skip
        assert client.request(method, path).status_code == 404, path
    assert tuned.name not in client.get("/models").text


@pytest.mark.parametrize(
    "path", ["../../secrets/session.key", "..%2f..%2fsecrets", "%2e%2e/", "/etc/passwd", "C:\\x", "a\0b", "file:///etc/passwd", "．．/x"]
)
def test_no_path_leads_out(client, api, session, data_dir, tmp_path: Path, path: str) -> None:
    before = sorted(p.as_posix() for p in tmp_path.rglob("*") if "data" not in p.parts)
    for body in ({"folder": path}, {"folder": path, "name": "x"}, {"hub": path}, {"starter": path}):
        assert 400 <= api.post("/v1/models", json=body).status_code < 500 or "hub" in body
    assert client.get(f"/models/{quote(path)}").status_code in (404, 400)
    assert sorted(p.as_posix() for p in tmp_path.rglob("*") if "data" not in p.parts) == before
