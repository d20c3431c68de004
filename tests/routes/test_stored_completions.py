"""Chat completions with `store`, through the unmodified client: listed, retrieved, changed, deleted, evaluated and made a dataset of."""

from __future__ import annotations

import json
import uuid
from datetime import timedelta

import openai
import pytest
from sqlalchemy import func, select, update

from app import personal_data, retention
from app.db import transaction
from app.kit import ids
from app.settings import get_settings
from app.storage import files
from app.tables import Answer, Dataset, Exchange, User
from app.web import auth
from tests.generating import _workers, answering_dir, generate_worker, register_agent, register_tiny  # noqa: F401
from tests.routes.test_batches import chat, lines_of, submit
from tests.routes.test_batches import ended as batch_ended
from tests.routes.test_evals import ended

ASK = [
    {"role": "developer", "content": "Answer in one short sentence."},
    {"role": "user", "content": [{"type": "text", "text": "What wood "}, {"type": "text", "text": "is the belly made of?"}]},
]


@pytest.fixture
def client(openai_client, generate_worker, session):  # noqa: F811
    register_tiny(session)
    return openai_client


def answer(client, **more):
    given = {"model": "tiny", "messages": ASK, "max_tokens": 6, "temperature": 0, "store": True}
    return client.chat.completions.create(**given | more)


def test_what_is_stored_is_retrieved_as_it_was_answered(client, session):
    said = answer(client, metadata={"team": "a"}, n=2, logprobs=True, top_logprobs=1, seed=3)
    answer(client, store=False)
    found = client.chat.completions.retrieve(said.id)
    assert found == said and found.metadata == {"team": "a"} and found.choices[1].logprobs.content[0].top_logprobs
    assert [one.id for one in client.chat.completions.list()] == [said.id]
    messages = list(client.chat.completions.messages.list(said.id, limit=1))  # in pages
    assert [(m.role, m.content, m.content_parts is None) for m in messages] == [
        ("developer", "Answer in one short sentence.", True),
        ("user", "What wood is the belly made of?", False),
    ]
    assert [part.text for part in messages[1].content_parts] == ["What wood ", "is the belly made of?"]
    assert [m.id for m in client.chat.completions.messages.list(said.id, order="desc")] == [m.id for m in reversed(messages)]
    assert session.scalar(select(func.count()).select_from(Exchange)) == 2, "one record of each call"


def test_a_stream_is_stored_once_it_has_ended(client, session):
    chunks = list(answer(client, stream=True, metadata={"kind": "stream"}))
    found = client.chat.completions.retrieve(chunks[0].id)
    assert found.object == "chat.completion" and found.choices[0].finish_reason == chunks[-1].choices[0].finish_reason
    assert found.choices[0].message.content == "".join(c.choices[0].delta.content or "" for c in chunks)
    assert found.model_extra["luthier"] == chunks[-1].model_extra["luthier"] and found.usage.completion_tokens > 0
    assert session.scalar(select(func.count()).select_from(Answer)) == 1
    with pytest.raises(openai.BadRequestError):
        list(answer(client, stream=True, messages=[{"role": "user", "content": "wood " * 3000}]))
    assert len(list(client.chat.completions.list())) == 1, "what failed is not stored"


def test_a_tool_call_and_a_schema_are_stored_with_it(client, session):
    register_agent(session)
    tool = {"type": "function", "function": {"name": "stop", "description": "Stops."}}
    said = answer(client, model="agent", messages=ASK[1:], tools=[tool], tool_choice="required", max_tokens=60, temperature=1, seed=3)
    found = client.chat.completions.retrieve(said.id)
    assert found.choices[0].message.tool_calls == said.choices[0].message.tool_calls and found.choices[0].finish_reason == "tool_calls"
    told = [
        *ASK[1:],
        said.choices[0].message.to_dict(),
        {"role": "tool", "tool_call_id": said.choices[0].message.tool_calls[0].id, "content": "ok"},
    ]
    after = answer(client, model="agent", messages=told)
    messages = list(client.chat.completions.messages.list(after.id))
    assert messages[1].tool_calls == said.choices[0].message.tool_calls and messages[2].role == "tool"


def test_lists_turn_pages_and_filter_and_metadata_is_replaced(client):
    first, second, third = (answer(client, metadata=pairs, max_tokens=1).id for pairs in ({"team": "a", "n": "1"}, {"team": "b"}, None))
    listed = client.chat.completions.list
    assert [one.id for one in listed(limit=1)] == [first, second, third] and next(iter(listed(order="desc", limit=2))).id == third
    assert [one.id for one in listed(metadata={"team": "a"})] == [first] and [one.id for one in listed(after=first, model="tiny")] == [
        second,
        third,
    ]
    assert not list(listed(model="other")) and not list(listed(metadata={"team": "a", "n": "2"}))
    assert client.chat.completions.update(first, metadata={"team": "b"}).metadata == {"team": "b"}
    assert [one.id for one in listed(metadata={"team": "b"})] == [first, second]
    assert client.chat.completions.update(second, metadata=None).metadata == {}
    assert [one.id for one in listed(extra_query={"metadata": "null"})] == [second, third]
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.update(first, metadata={"team": "x" * 600})
    assert wrong.value.param == "metadata.team"


def test_what_is_deleted_is_gone_with_its_record(client, session):
    said = answer(client)
    gone = client.chat.completions.delete(said.id)
    assert gone.deleted and gone.id == said.id and gone.object == "chat.completion.deleted"
    not_stored = answer(client, store=None)
    for call in (client.chat.completions.retrieve, client.chat.completions.delete, lambda key: client.chat.completions.messages.list(key)):
        for key in (said.id, not_stored.id, "chatcmpl-" + "0" * 32, "nothing"):
            with pytest.raises(openai.NotFoundError) as caught:
                call(key)
            assert caught.value.param == "completion_id"
    assert [row.id.hex for row in session.scalars(select(Exchange))] == [not_stored.id.removeprefix("chatcmpl-")]
    assert session.scalar(select(func.count()).select_from(Answer)) == 1


def test_a_stored_one_goes_with_its_time_and_its_person_and_is_nobody_elses(client, session, user, monkeypatch, tmp_path):
    old, new = answer(client, max_tokens=1), answer(client, max_tokens=1)
    eva = User(id=uuid.uuid4(), name="eva")
    session.add(eva)
    session.flush()
    _, key = auth.create_key(session, eva, "hers")
    session.commit()
    eva_id = eva.id
    hers = client.with_options(api_key=key)
    own = answer(hers, max_tokens=1)
    assert [one.id for one in hers.chat.completions.list()] == [own.id]
    with pytest.raises(openai.NotFoundError):
        hers.chat.completions.retrieve(old.id)
    monkeypatch.setattr(get_settings(), "keep_playground_days", 3)
    past = ids.parse_completion(old.id)
    session.execute(update(Exchange).where(Exchange.id == past).values(created_at=func.clock_timestamp() - timedelta(days=4)))
    session.commit()
    with transaction() as other:
        assert retention.apply(other)["playground"] == 1
    assert [one.id for one in client.chat.completions.list()] == [new.id]
    with transaction() as other:
        counts = personal_data.export(other, other.get_one(User, eva_id), tmp_path / "eva.zip")
        assert counts["exchanges"] == 1
        assert personal_data.remove(other, other.get_one(User, eva_id))["exchanges"] == 1
    assert [row.owner_id for row in session.scalars(select(Exchange))] == [user.id]


def test_one_of_a_batch_is_stored_too(client, session):
    """An answer of a batch is in its file alone, but for those that ask to be kept."""
    lines = [chat("alone", messages=ASK[:1], max_tokens=1), chat("kept", messages=ASK[:1], max_tokens=1, store=True)]
    batch = batch_ended(client, submit(client, lines))
    answers = {line["custom_id"]: line["response"]["body"]["id"] for line in lines_of(client, batch.output_file_id)}
    assert len(answers) == 2 and [one.id for one in client.chat.completions.list()] == [answers["kept"]]
    assert session.scalar(select(func.count()).select_from(Exchange)) == 1


# Evals ----------------------------------------------------------------------------------------------------------------

WORDS = {"type": "string_check", "name": "said", "operation": "like", "input": "{{item.input[0].content}}", "reference": "Say"}


def short(most: int) -> dict:
    return {"type": "length", "name": "short", "max": most, "unit": "characters"}


@pytest.mark.parametrize("kind", ["logs", "stored_completions"])
def test_stored_answers_are_graded_as_they_are(client, kind):
    kept = [answer(client, messages=[{"role": "user", "content": text}], metadata={"team": team}) for text, team in (("Say one.", "a"), ("two", "a"), ("Say x.", "b"))]  # fmt: skip
    made = client.evals.create(name="logs", data_source_config={"type": kind, "metadata": {"team": "a"}}, testing_criteria=[WORDS])
    assert made.data_source_config.type == kind and made.data_source_config.metadata == {"team": "a"}
    assert {"item", "sample"} == set(made.data_source_config.schema_["required"])
    source = {"type": "completions", "source": {"type": "stored_completions", "model": "tiny"}}
    run = ended(client, client.evals.runs.create(made.id, data_source=source))
    assert (run.status, run.model, run.result_counts.passed, run.result_counts.failed) == ("completed", "", 1, 1), run
    items = {item.datasource_item["id"]: item for item in client.evals.runs.output_items.list(run.id, eval_id=made.id)}
    assert set(items) == {kept[0].id, kept[1].id} and items[kept[0].id].status == "pass"
    sample = items[kept[0].id].sample
    assert sample.output[0].content == kept[0].choices[0].message.content and sample.model == "tiny" and sample.temperature == 0
    assert sample.usage.total_tokens == kept[0].usage.total_tokens and sample.input[0].content == "Say one." and not run.per_model_usage


def test_another_model_is_asked_what_was_stored(client, session):
    register_tiny(session, "other")
    kept = [answer(client, messages=[{"role": "user", "content": f"Say {n}."}]) for n in range(3)]
    made = client.evals.create(data_source_config={"type": "logs"}, testing_criteria=[short(10_000)])
    source = {
        "type": "completions", "model": "other", "input_messages": {"type": "item_reference", "item_reference": "item.input"},
        "source": {"type": "stored_completions", "limit": 2}, "sampling_params": {"temperature": 0, "max_completion_tokens": 6},
    }  # fmt: skip
    run = client.evals.runs.create(made.id, data_source=source)
    run = ended(client, run)
    assert (run.status, run.model, run.result_counts.passed) == ("completed", "other", 2), run
    items = {item.datasource_item["id"]: item for item in client.evals.runs.output_items.list(run.id, eval_id=made.id)}
    assert set(items) == {kept[1].id, kept[2].id}, "the newest"
    assert items[kept[2].id].sample.output[0].content == kept[2].choices[0].message.content, "the same weights"


def test_a_run_is_over_what_was_there_when_it_was_made(client, session, user):
    """One that is deleted before its turn is an error of that item alone; places do not move."""
    from app.evals import service as evals
    from app.evals import sources

    kept = [answer(client, max_tokens=1) for _ in range(2)]
    made = client.evals.create(data_source_config={"type": "logs"}, testing_criteria=[short(10_000)])
    source = sources.read({"type": "completions", "source": {"type": "stored_completions"}})
    with transaction() as other:
        found = evals.get(other, user, ids.parse(ids.EVAL, made.id))
        run = evals.create_run(other, user, found, "a", source, None)
        other.delete(other.get_one(Exchange, ids.parse_completion(kept[0].id)))
        assert len(run.stored_ids) == 2
    answer(client, max_tokens=1)
    run = ended(client, client.evals.runs.retrieve(ids.public(ids.EVAL_RUN, run.id), eval_id=made.id))
    assert (run.result_counts.total, run.result_counts.passed, run.result_counts.errored) == (2, 1, 1)
    (wrong,) = client.evals.runs.output_items.list(run.id, eval_id=made.id, status="error")
    assert wrong.sample.error.code == "deleted" and wrong.datasource_item == {"id": kept[0].id}


def test_runs_over_what_is_stored_that_are_refused(openai_client, session):
    register_tiny(session)
    made = openai_client.evals.create(data_source_config={"type": "logs"}, testing_criteria=[short(5)])
    stored = {"type": "stored_completions"}
    template = {"type": "template", "template": [{"role": "user", "content": "x"}]}
    content = {"type": "file_content", "content": [{"item": {"input": []}}]}
    for source, param in (
        ({"source": stored}, "data_source.source"),
        ({"source": stored, "model": "tiny"}, "data_source.input_messages"),
        ({"source": stored, "input_messages": template}, "data_source.model"),
        ({"source": stored, "sampling_params": {"temperature": 0}}, "data_source.model"),
        ({"source": content}, "data_source.model"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            openai_client.evals.runs.create(made.id, data_source={"type": "completions", **source})
        assert caught.value.param == param, source
    for config, param in (
        ({"type": "logs", "metadata": {"a": 1}}, "data_source_config.metadata"),
        ({"type": "logs", "item_schema": {}}, "data_source_config.item_schema"),
        ({"type": "responses"}, "data_source_config.type"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            openai_client.evals.create(data_source_config=config, testing_criteria=[short(5)])
        assert caught.value.param == param


# Datasets -------------------------------------------------------------------------------------------------------------


def test_stored_answers_become_a_dataset(client, api, session, user):
    register_agent(session)
    tool = {"type": "function", "function": {"name": "stop", "description": "Stops."}}
    order = {"model": "agent", "tools": [tool], "tool_choice": "required", "max_tokens": 60, "temperature": 1, "seed": 3}
    called = answer(client, metadata={"team": "a"}, **order)
    cut = answer(client, metadata={"team": "a"}, max_tokens=1, logit_bias={"70": 100})
    assert cut.choices[0].finish_reason == "length"
    answer(client, metadata={"team": "b"}, **order)
    made = api.post("/v1/datasets/stored_completions", json={"metadata": {"team": "a"}, "name": "Calls"}).json()
    assert (made["rows"], made["excluded"], made["name"], made["status"]) == (1, 1, "Calls", "reading")
    dataset = session.get_one(Dataset, ids.parse(ids.DATASET, made["id"]))
    (row,) = map(json.loads, files.content(session, user, dataset.file_id).read_text().splitlines())
    assert row["tools"][0]["function"]["name"] == "stop" and [m["role"] for m in row["messages"]] == ["developer", "user", "assistant"]
    assert row["messages"][1]["content"] == "What wood is the belly made of?"
    assert row["messages"][2]["tool_calls"][0]["function"] == called.choices[0].message.tool_calls[0].function.to_dict()
    assert dataset.format == "chat"
    empty = api.post("/v1/datasets/stored_completions", json={"model": "none"})
    assert empty.status_code == 409 and "store: true" in empty.json()["error"]["message"] + str(empty.json())
