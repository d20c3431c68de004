"""The export tab of a model in a real browser: the files, how they compare with the model, and their answers next to each other."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from app.kit import ids
from app.tables import Export
from tests.looks import look_at

pytestmark = pytest.mark.browser

HERE = [
    ("What is the capital of France?", "The capital of France is Paris."),
    ("Write a short sentence about the sea.", "The sea is a vast and mysterious realm, teeming with life and unending in its own way."),
]
PARTED = "L'Étoile, la Marseillaise, la femme, la femme, la femme, la femme, la femme, la femme, la femme, la femme, la femme, la"


def line(kind: str, size: int, there: float, apart: int | None = None, faults: tuple[str, ...] = ()) -> dict[str, Any]:
    same = {"parts_at": None, "answer": None, "behind": None}
    answers = [same if apart is None else {"parts_at": apart, "answer": PARTED, "behind": 0.083}, same]
    verdict = "as the model" if apart is None else "answers part on 1 of 2 prompts, in the median at token 1"
    return {
        "type": kind, "bytes": size, "prompts": 8, "identical": 8, "places": 48, "kl": 0.0041, "top1": 0.958, "limit": 0.01,
        "answers": answers, "same_answers": 2 if apart is None else 1, "tokens_per_second": 122.0, "verdict": verdict,
        "score": {"metric": "loss", "rows": 24, "here": 1.934, "there": there, "interval": [there - 1.937, there - 1.931], "kept": True},
        "faults": [{"cause": "weights", "message": message} for message in faults],
    }  # fmt: skip


@pytest.fixture
def export(session, user, tiny_registered) -> Export:
    lines = [line("F16", 271_000_000, 1.934), line("Q8_0", 145_000_000, 1.936, 0)]
    coarse = line(
        "Q4_0",
        92_000_000,
        2.318,
        0,
        ("Q4_0 is too coarse for this model, or its weights differ: KL 0.61 nats, and rounding to Q4_0 explains 0.5.",),
    )
    made = Export(
        id=uuid.uuid4(), owner_id=user.id, model_id=tiny_registered.id, format="gguf", status="succeeded",
        spec={"model": {"name": "tiny"}, "types": ["F16", "Q8_0", "Q4_0"]},
        files=[
            {"name": f"tiny-{one['type']}.gguf", "type": one["type"], "bytes": one["bytes"], "sha256": "ab" * 32, "notes": []}
            for one in [*lines, coarse]
        ],
        parity={
            "program": "llama.cpp", "rows": "general texts", "smallest": "Q8_0", "lines": [*lines, coarse], "seconds": 40.0, "skipped": None,
            "answers": [{"prompt": prompt, "answer": answer} for prompt, answer in HERE],
        },
    )  # fmt: skip
    session.add(made)
    session.commit()
    return made


@pytest.mark.long
def test_where_answers_part_is_said_and_they_stand_next_to_each_other(page: Page, served: str, export: Export, tmp_path: Path):
    page.set_viewport_size({"width": 1360, "height": 900})
    page.goto(f"{served}/models/{ids.public(ids.MODEL, export.model_id)}?tab=export")
    rows = page.get_by_role("region", name="The files compared with the model").locator("tbody tr")
    expect(rows.nth(0)).to_contain_text("As the model")
    expect(rows.nth(1)).to_contain_text("Answers part on 1 of 2 prompts, in the median at token 1")
    expect(rows.nth(1)).to_contain_text("smallest that keeps the score")
    expect(rows.nth(2)).to_contain_text("too coarse for this model")
    page.get_by_text("Answers at temperature 0").click()
    shown = page.locator("dl.glossary").first
    expect(shown).to_contain_text(PARTED)
    expect(shown).to_contain_text("other from token 1, which the model holds 0.08 nats less likely than its own")
    look_at(page, "export-answers", tmp_path)


def test_an_export_of_an_earlier_version_is_still_shown(page: Page, served: str, session, export: Export):
    new = ("answers", "same_answers", "score", "verdict")
    lines = [{name: value for name, value in one.items() if name not in new} | {"loss": 1.9} for one in export.parity["lines"]]
    export.parity = {name: value for name, value in export.parity.items() if name != "answers"} | {"lines": lines}
    session.commit()
    page.goto(f"{served}/models/{ids.public(ids.MODEL, export.model_id)}?tab=export")
    expect(page.get_by_text("No fault found").first).to_be_visible()
    expect(page.get_by_text("Answers at temperature 0")).to_have_count(0)
