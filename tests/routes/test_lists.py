"""Order among many: which models are offered, names and tags, searching, filtering and bulk, and runs beside each other."""

from __future__ import annotations

import re

from app import comparisons, ids
from app.tables import Model
from tests.routes.test_comparisons import body, chats, create, end, kinds, make, words

__all__ = ["chats", "kinds", "make"]


def options(page) -> dict[str, str]:
    """Value → text of every option of a page."""
    found = re.findall(r'<option value="([^"]*)"[^>]*>([^<]*)', page.text)
    return {value: text.strip() for value, text in found}


def test_results_of_a_comparison_are_offered_once_they_are_kept(api, client, session, user, tiny_registered, chats):
    found = create(session, user, body(chats, "lora", "ia3"))
    first, second = comparisons.jobs_of(session, found)
    end(session, first, loss=1.2, memory=1, seconds=1)
    end(session, second, loss=1.6, memory=2, seconds=2)
    page, pages = f"/compare/{ids.public(ids.COMPARISON, found.id)}", ("/jobs/new", "/compare/new", "/jobs/advice", "/evaluations")
    pages += ("/playground", "/playground/ab", "/playground/batch", "/playground/vectors", "/playground/tokens")
    for path in pages:
        offered = options(client.get(path))
        assert "tiny" in offered and not [name for name in offered if name.startswith("ft:")], path
    listed = {model["id"]: model for model in api.get("/v1/models").json()["data"]}
    row = next(r for r in api.get(f"/v1/comparisons/{page.split('/')[-1]}").json()["data"] if r["job"] == ids.public(ids.JOB, first.id))
    assert listed[row["model"]]["kept"] is row["kept"] is False and listed["tiny"]["kept"], "the API lists all, and says which"
    assert "2 from comparisons" in words(client.get("/models"))
    chosen = options(client.get("/jobs/new", params={"model": row["model"]}))
    assert [name for name in chosen if name.startswith("ft:")] == [row["model"]], "one that was named is offered"
    answer = client.post(f"{page}/keep", data={"job": row["job"]})
    assert "is kept" in words(answer) and "1 from comparisons" in words(client.get("/models"))
    model = session.query(Model).filter_by(name=row["model"]).populate_existing().one()
    tiny = session.get_one(Model, model.base_id)
    for path in pages:
        text = options(client.get(path))[model.name]
        assert text.startswith(f"{model.title} · {tiny.title} · {model.created_at:%Y-%m-%d}"), path
    assert client.post(f"{page}/keep", data={"job": ids.public(ids.JOB, found.id)}).status_code == 404, "of another comparison"
