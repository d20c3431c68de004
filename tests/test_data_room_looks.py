"""The data room in a real browser: the report, rows with their mask, the ledger and the editor, in light, dark and 320 px."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator

import pytest

from app import datasets, files, ids
from app.tables import Event, Job
from tests.data_worker import data_worker
from tests.test_looks import check, page, served

__all__ = ["page", "served"]
pytestmark = pytest.mark.browser


def chat(question, answer, role="user"):
    return json.dumps({"messages": [{"role": role, "content": question}, {"role": "assistant", "content": answer}]})


@pytest.fixture
def room(session, user, tiny_registered, data_dir) -> Iterator[str]:
    """A dataset with findings of many kinds, counted, and judged by a job."""
    draw = random.Random(5)
    words = "the belly of a violin is made of spruce and its back of maple with a thin coat of varnish on it".split()
    rows = [chat(f"Question {n}: " + " ".join(draw.choices(words, k=12)) + "?", " ".join(draw.choices(words, k=10 + n))) for n in range(60)]
    rows += [rows[3], chat("a", "b", "human"), "{broken", chat("Who?", "Write to anna.berg@hafen.de"), chat("Say <|im_end|>", "ding\x07dong")]
    dataset = datasets.create(session, user, files.add_bytes(session, user, "\n".join(rows).encode(), "violins.jsonl", "fine-tune"))
    session.commit()
    datasets.read(dataset.id)
    session.expire_all()
    job = Job(owner_id=user.id, name="violin-tone", status="succeeded", spec={}, model_id=tiny_registered.id, dataset_id=dataset.id)
    session.add(job)
    session.flush()
    session.add(Event(job_id=job.id, attempt=1, type="finished", data={"path": f"runs/{job.id}/a1/final"}))
    session.commit()
    folder = data_dir / "runs" / str(job.id) / "a1"
    (folder / "final").mkdir(parents=True)
    losses = [round(draw.uniform(0.2, 1.5), 3) for _ in range(60)]
    ledger = {"line": list(range(1, 61)), "before": [2.0 + loss for loss in losses], "after": losses, "tokens": [20] * 60}
    (folder / "ledger.json").write_text(json.dumps(ledger))
    with data_worker():
        yield f"/datasets/{ids.public(ids.DATASET, dataset.id)}"


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1360, 320])
def test_the_data_room(page, served, room, tmp_path, theme, width):  # noqa: F811
    page.set_viewport_size({"width": width, "height": 900})
    page.context.add_cookies([{"name": "luthier_theme", "value": theme, "url": served}])
    places = [("report", ""), ("fix", "?rule=wrong_role"), ("mask", "/rows?cutoff=64"), ("ledger", "/rows?sort=after"), ("edit", "/rows/2")]
    places += [("upload", "/../new")]
    for name, tail in places:
        page.goto(f"{served}{room}{tail}")
        for _ in range(20):
            if not page.locator("script[src*='again.js']").count():
                break
            page.wait_for_timeout(400)
            page.goto(f"{served}{room}{tail}")
        check(page, tmp_path, f"{name}-{theme}-{width}")
