"""A matrix of base models by datasets, runs from random weights next to tuned ones, and the size curve."""

from __future__ import annotations

import json

import pytest
from sqlalchemy import select

from app.evaluation import comparison_table, comparisons, matrix
from app.jobs import row_losses
from app.kit import ids
from app.tables import Event
from app.views import comparison as comparison_view
from tests.routes.test_comparisons import chats, create, end, kinds, words
from tests.routes.test_model_comparisons import several, two

__all__ = ["chats", "kinds", "two"]


def order(*datasets, **more) -> dict:
    named = [ids.public(ids.DATASET, one.id) for one in datasets]
    return {"kind": "matrix", "models": ["tiny", "wide"], "dataset_ids": named, "strategies": ["lora"], **more}


def with_losses(session, data_dir, job, losses: list[float]) -> None:
    """The losses of its validation rows, as its trainer leaves them behind."""
    path = session.scalar(select(Event.data).where(Event.job_id == job.id, Event.type == "finished"))["path"]
    columns = {"line": [*range(len(losses))], "before": [3.0] * len(losses), "after": losses, "tokens": [10] * len(losses)}
    (data_dir / path).parent.mkdir(parents=True, exist_ok=True)
    ((data_dir / path).parent / row_losses.FILE).write_text(json.dumps({**columns, "held_out": [True] * len(losses)}))


def test_each_cell_has_a_score_and_its_interval_and_each_dataset_its_own_best(api, client, session, user, two, chats, kinds, data_dir):
    found = create(session, user, order(chats, kinds))
    made = comparisons.jobs_of(session, found)
    assert [(job.dataset_id, job.spec["model"]["name"]) for job in made] == [
        (chats.id, "tiny"), (chats.id, "wide"), (kinds.id, "tiny"), (kinds.id, "wide"),
    ]  # fmt: skip
    assert found.name == "2 base models on 2 datasets" and made[3].name.endswith("kinds, wide, LoRA")
    end(session, made[0], loss=1.0, memory=100, seconds=5, bits_per_byte=1.0)
    end(session, made[1], loss=0.8, memory=300, seconds=9, bits_per_byte=0.8)
    with_losses(session, data_dir, made[0], [0.9, 1.1] * 20)
    with_losses(session, data_dir, made[1], [0.7, 0.9] * 20)
    end(session, made[2], loss=0.5, memory=100, seconds=5, accuracy=0.75, macro_f1=0.7, noise=0.02)
    said = api.get(f"/v1/comparisons/{ids.public(ids.COMPARISON, found.id)}").json()
    columns, rows = said["matrix"]["columns"], said["matrix"]["rows"]
    assert [(one["name"], one["score"], one["less"]) for one in columns] == [("chats", "bits_per_byte", True), ("kinds", "accuracy", False)]
    assert [(row["model"], row["title"]) for row in rows] == [("tiny", "LoRA"), ("wide", "LoRA")] and said["model"] is None
    first, second = rows[0]["cells"][0], rows[1]["cells"][0]
    assert (first["score"], second["score"], first["best"], second["best"]) == (1.0, 0.8, False, True)
    low, high = first["interval"]
    assert low < 1.0 < high and high - low == pytest.approx(2 * 1.96 * 0.1 / 39**0.5, rel=0.01), "40 rows that are 0.1 from their mean"
    assert rows[0]["cells"][1]["interval"] == [pytest.approx(0.35), pytest.approx(1.15)], "as its trainer told it"
    assert rows[1]["cells"][1] == {**rows[1]["cells"][1], "status": "queued", "score": None, "interval": None, "best": False}
    page = client.get(f"/compare/{ids.public(ids.COMPARISON, found.id)}")
    assert "Base models by datasets" in words(page) and "0.969 to 1.03" in words(page) and "chats: wide, LoRA" in words(page)


def test_an_interval_is_wider_with_fewer_rows(session, user, two, chats, data_dir):
    found = create(session, user, several(chats, "lora"))
    first, second = comparisons.jobs_of(session, found)
    for job, rows in ((first, 10), (second, 90)):
        end(session, job, loss=1.0, memory=1, seconds=1, bits_per_byte=2.0)
        with_losses(session, data_dir, job, [0.9, 1.1] * (rows // 2))
    wide, narrow = (matrix.interval_of(session, job, "bits_per_byte", 2.0) for job in (first, second))
    assert wide[1] - wide[0] == pytest.approx(3.13 * (narrow[1] - narrow[0]), rel=0.02)
    assert matrix.interval_of(session, first, "accuracy", 0.9) == pytest.approx((0.769, 0.96), abs=0.001), "40 rows, by Wilson"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"dataset_ids": None}, "the kind `matrix` compares on the datasets"),
        ({"kind": "models"}, "no other kind takes them"),
        ({"models": None, "model": "tiny"}, "and no other kind takes them"),
        ({"task": "generation"}, "omit dataset_id"),
        ({"dataset_ids": ["ds-" + "0" * 32] * 2}, "named twice"),
        ({"dataset_ids": ["ds-" + "0" * 32, "ds-" + "1" * 32]}, "No such dataset"),
    ],
)
def test_what_is_wrong_with_a_matrix_is_said(api, two, chats, kinds, change, says):
    body = {name: value for name, value in {**order(chats, kinds), **change}.items() if value is not None}
    answer = api.post("/v1/comparisons", json=body)
    assert answer.status_code in (400, 404) and says in answer.json()["error"]["message"] + str(answer.json()["error"].get("hint")), (
        answer.text
    )


def test_random_weights_are_put_next_to_the_tuned_ones(session, user, two, chats):
    found = create(session, user, several(chats, "lora", from_nothing=True))
    made = comparisons.jobs_of(session, found)
    assert [job.spec["strategy"] for job in made if job.spec["strategy"]["name"] == "full"] == [{"name": "full", "weights": "random"}] * 2
    assert made[1].spec["run"]["learning_rate"] == pytest.approx(9e-4), "random weights need a larger one"
    for job, bits in zip(made, (1.0, 2.5, 0.8, 2.4), strict=True):
        end(session, job, loss=bits, memory=1, seconds=1, bits_per_byte=bits)
    table = comparison_table.table(session, found)
    assert [(row["title"], row["blank"]) for row in table.rows] == [
        ("tiny, LoRA", False), ("tiny, From nothing", True), ("wide, LoRA", False), ("wide, From nothing", True),
    ]  # fmt: skip
    sizes = comparison_view.page(session, found)["sizes"]
    assert [one.title for one in sizes] == ["Bits per byte", "Peak memory", "Time"]
    assert [name for name, _, _ in sizes[0].picture.lines] == ["LoRA", "From nothing"]


def test_a_matrix_is_chosen_in_the_form(client, session, user, two, chats, kinds):
    first = client.get("/compare/new", params={"kind": "matrix"})
    assert first.text.count('name="on"') == 2 and "Start 4 runs" in words(first), (
        "two base models on two datasets with the recommended method"
    )
    one = client.get("/compare/new", params={"kind": "matrix", "shown": "matrix", "on": ids.public(ids.DATASET, chats.id), "base": "tiny"})
    assert "Choose at least two datasets" in words(one) and 'name="no_methods"' in one.text
    again = {
        "kind": "matrix",
        "shown": "matrix",
        "no_methods": "yes",
        "base": "tiny",
        "on": [ids.public(ids.DATASET, d.id) for d in (chats, kinds)],
    }
    assert "Start 2 runs" in words(client.get("/compare/new", params=again)), "methods that were not shown were not unchecked"
    keys = [ids.public(ids.DATASET, one.id) for one in (chats, kinds)]
    sent = {"kind": "matrix", "shown": "matrix", "on": keys, "base": ["tiny", "wide"], "strategy": ["lora"], "from_nothing": "true"}
    both = client.get("/compare/new", params=sent, headers={"hx-request": "true"})
    assert "Start 8 runs" in words(both) and "from_nothing=true" in both.headers["hx-replace-url"]
    ordered = client.post("/compare", data={**sent, "key": "k"}, follow_redirects=False)
    assert ordered.status_code == 303 and len(comparisons.jobs_of(session, session.scalars(comparisons.mine(user)).one())) == 8
    assert "matrix" in words(client.get("/compare"))
