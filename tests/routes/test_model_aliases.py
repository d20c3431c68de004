"""Aliases of models: called by the unmodified client, moved under its feet, and answered by a real worker."""

from __future__ import annotations

import pytest
from sqlalchemy import text
from starlette.testclient import TestClient

from app.errors import Conflict
from app.inference import playground
from app.kit import ids
from app.models import imports as model_imports
from app.tables import Answer, ModelAlias, User
from app.web import auth
from tests.conftest import ORIGIN
from tests.generating import _workers, answering_dir, generate_worker, register_tiny, stored_answers  # noqa: F401

ASK = [{"role": "user", "content": "What wood is the belly made of?"}]


@pytest.fixture
def two(session):
    """Two models with the same weights and different revisions, so that an answer tells which of them gave it."""
    return register_tiny(session, "tiny"), register_tiny(session, "other")


def put(api, alias: str, model: str):
    return api.put(f"/v1/model_aliases/{alias}", json={"model": model})


def test_an_alias_is_set_moved_listed_and_removed(api, openai_client, two) -> None:
    first = put(api, "support-bot", "tiny").json()
    assert (first["id"], first["object"], first["model"]) == ("support-bot", "model.alias", "tiny")
    assert put(api, "team/bot", ids.public(ids.MODEL, two[0].id)).json()["model"] == "tiny", "by its id, and with a slash"
    found = {model.id: model.alias_of for model in openai_client.models.list()}
    assert found == {"tiny": None, "support-bot": "tiny", "team/bot": "tiny", "other": None}
    one = openai_client.models.retrieve("support-bot")
    assert (one.id, one.alias_of, one.key) == ("support-bot", "tiny", ids.public(ids.MODEL, two[0].id))
    moved = put(api, "support-bot", "other").json()
    assert moved["model"] == "other" and moved["created_at"] == first["created_at"] <= moved["moved_at"]
    assert openai_client.models.retrieve("support-bot").alias_of == "other"
    assert put(api, "second", "support-bot").json()["model"] == "other", "an alias is taken wherever a model's name is"
    listed = api.get("/v1/model_aliases").json()
    assert [(one["id"], one["model"]) for one in listed["data"]] == [("second", "other"), ("support-bot", "other"), ("team/bot", "tiny")]
    assert api.delete("/v1/model_aliases/team/bot").json() == {"id": "team/bot", "object": "model.alias", "deleted": True}
    for gone in (api.delete("/v1/model_aliases/team/bot"), api.get("/v1/models/team/bot")):
        assert (gone.status_code, gone.json()["error"]["code"]) == (404, "resource_missing")


@pytest.mark.parametrize(
    ("alias", "model", "status", "param"),
    [
        ("tiny", "other", 409, "alias"),
        ("smollm2-135m-instruct", "other", 409, "alias"),  # a starter that is not here yet
        ("a b", "other", 400, "alias"),
        ("bot@0.5", "other", 400, "alias"),
        ("ft:bot", "other", 400, "alias"),
        ("a/b/c", "other", 400, "alias"),
        ("b" * 65, "other", 400, "alias"),
        (f"model-{'0' * 32}", "other", 400, "alias"),
        ("ftckpt_bot", "other", 400, "alias"),
        ("bot", "nobody", 404, "model"),
        ("bot", "hidden", 404, "model"),
        ("bot", "coming", 409, "model"),
    ],
)
def test_what_cannot_be_an_alias(api, session, two, alias, model, status, param) -> None:
    somebody = User(name="somebody else")
    session.add(somebody)
    session.flush()
    register_tiny(session, "hidden", owner_id=somebody.id)
    register_tiny(session, "coming", status="fetching")
    answer = put(api, alias, model)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param), answer.text
    assert api.get("/v1/model_aliases").json()["data"] == []


def test_names_of_other_projects_are_free(api, session, two) -> None:
    somebody = User(name="somebody else")
    session.add(somebody)
    session.flush()
    register_tiny(session, "hidden", owner_id=somebody.id)
    assert put(api, "hidden", "other").json()["model"] == "other"


def test_an_unknown_model_is_refused_as_before(api, two) -> None:
    unknown = api.get("/v1/models/gpt-4o").json()["error"]
    assert unknown["message"].startswith("No such model: 'gpt-4o'.") and unknown["param"] == "model"


def test_a_model_takes_no_name_of_an_alias_and_goes_not_before_it(api, session, user, data_dir, tiny_model, two) -> None:
    put(api, "support-bot", "tiny")
    with pytest.raises(Conflict, match="support-bot is an alias already"):
        model_imports.add_folder(session, user, str(tiny_model), "support-bot", anywhere=True)
    refused = api.delete("/v1/models/support-bot")
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "model_in_use")
    assert "The alias support-bot points to it." in refused.json()["error"]["message"]
    put(api, "support-bot", "other")
    assert api.delete("/v1/models/tiny").json()["deleted"] is True


def test_aliases_are_each_persons_own(api, web, session, two) -> None:
    somebody = User(name="somebody else")
    session.add(somebody)
    session.flush()
    _, key = auth.create_key(session, somebody, "theirs")
    session.commit()
    theirs = TestClient(web.app, base_url=ORIGIN, headers={"authorization": f"Bearer {key}"})
    put(api, "bot", "tiny")
    assert theirs.get("/v1/models/bot").status_code == theirs.delete("/v1/model_aliases/bot").status_code == 404
    put(theirs, "bot", "other")
    assert [one.get("/v1/models/bot").json()["alias_of"] for one in (api, theirs)] == ["tiny", "other"]


def test_the_alias_answers_and_is_moved_at_once(openai_client, session, two, generate_worker) -> None:  # noqa: F811
    """Chat whole and streamed, completions: the answer carries the name that was asked for, and says who gave it."""
    client = openai_client

    def put_to(model: str) -> None:
        client.put("/model_aliases/support-bot", body={"model": model}, cast_to=object)

    for model in ("tiny", "other"):
        put_to(model)
        said = client.chat.completions.create(model="support-bot", messages=ASK, max_tokens=3, temperature=0)
        assert (said.model, said.luthier["model"]) == ("support-bot", model)
        text_said = client.completions.create(model="support-bot", prompt="The belly", max_tokens=3, temperature=0)
        assert (text_said.model, text_said.luthier["model"]) == ("support-bot", model)
        chunks = list(client.chat.completions.create(model="support-bot", messages=ASK, max_tokens=3, temperature=0, stream=True))
        assert {chunk.model for chunk in chunks} == {"support-bot"} and chunks[-1].luthier["model"] == model
    stored_answers(session, 6)
    rows = session.query(Answer).order_by(Answer.created_at).all()
    assert [row.model_id for row in rows] == [two[0].id] * 3 + [two[1].id] * 3, "the record says which model it was"
    assert {row.model_name for row in rows} == {"support-bot"}


def test_the_playground_offers_and_asks_an_alias(client, api, session, user, two) -> None:
    put(api, "support-bot", "tiny")
    page = client.get("/playground?models=support-bot")
    assert (
        '<optgroup label="Aliases">' in page.text
        and '<option value="support-bot" data-kind="dialogue" selected>support-bot · tiny</option>' in page.text
    )
    assert playground.speaker(session, user, "support-bot").resolved.model.id == two[0].id


def test_the_forms_of_the_page(client, session, two) -> None:
    key = ids.public(ids.MODEL, two[0].id)
    page = client.post(f"/models/{key}/aliases", data={"alias": " support-bot "}).text
    assert "support-bot points to tiny from now on." in page and "model=&#34;support-bot&#34;" in page, "the code uses it"
    elsewhere = client.get(f"/models/{ids.public(ids.MODEL, two[1].id)}").text
    assert "Move here" in elsewhere and f'points to <a href="/models/{key}">tiny</a>' in elsewhere
    wrong = client.post(f"/models/{key}/aliases", data={"alias": "no good"})
    assert wrong.status_code == 400 and 'value="no good"' in wrong.text and "cannot be a model" in wrong.text
    taken = client.post(f"/models/{key}/aliases", data={"alias": "other"})
    assert taken.status_code == 409 and "other is the name of a model." in taken.text
    assert "The alias support-bot points to it." in client.get(f"/models/{key}?tab=settings").text
    page = client.post(f"/models/{key}/aliases/remove", data={"alias": "support-bot"}).text
    assert "The alias support-bot was removed." in page and session.query(ModelAlias).count() == 0


def test_an_alias_goes_with_whoever_chose_it(session) -> None:
    somebody, model = User(name="somebody"), register_tiny(session)
    session.add(somebody)
    session.flush()
    session.add(ModelAlias(owner_id=somebody.id, name="bot", model_id=model.id))
    session.flush()
    session.execute(text("DELETE FROM users WHERE id = :id"), {"id": somebody.id})
    assert session.scalar(text("SELECT count(*) FROM model_aliases")) == 0
