"""The recipe from a generic model to a dialogue model, walked through by its buttons, with small models in the starters' places."""

from __future__ import annotations

import shutil

import pytest
from sqlalchemy import select

from app.errors import Conflict
from app.models import starters
from app.tables import Dataset, Job, Model
from app.views import tutorial
from tests.data_worker import data_worker
from tests.factories import carry_out
from tests.generating import register_tiny
from tests.looks import look_at, sign_in


def arrive(session, name: str, kind: str) -> Model:
    """What the fetching worker would bring, but the small model."""
    model = session.scalars(select(Model).where(Model.name == name)).one()
    assert model.status == "fetching"
    session.delete(model)
    session.commit()
    return register_tiny(session, name, kind)


def test_nothing_is_tuned_before_there_is_a_generic_model(session, user):
    with pytest.raises(Conflict, match="no base model"):
        tutorial.tune(session, user)
    register_tiny(session, "converses", "dialogue")
    assert [[action.title for action in step.actions] for step in tutorial.steps(session, user)] == [
        ["Read the terms and add it"], [], ["Ask it"]
    ]  # fmt: skip


@pytest.mark.long
@pytest.mark.browser
@pytest.mark.timeout(240)
def test_one_button_a_step(browser_page, served, session, user, data_dir, tiny_model, tmp_path):
    shutil.copytree(tiny_model, data_dir / "models" / "tiny", dirs_exist_ok=True)
    kept = data_dir / "models" / f".{starters.model_id(tutorial.GENERIC)}.terms.txt"
    kept.write_text("Last modified\n\nBy using Gemma you agree.\n")
    page = sign_in(browser_page, served, session, user)
    page.goto(f"{served}/playground/tutorial")
    look_at(page, "kinds-empty", tmp_path)
    page.get_by_role("link", name="Read the terms and add it").click()
    page.get_by_label("I have read the").check()
    page.get_by_role("button", name="Accept and add").click()
    page.get_by_text(f"{tutorial.GENERIC} is being downloaded.").wait_for()
    generic = arrive(session, tutorial.GENERIC, "generic")
    with data_worker():
        page.get_by_role("button", name="Fine-tune it here").click()  # the page has found out by itself
        page.get_by_text("training…").wait_for()
        look_at(page, "kinds-tuning", tmp_path)
        page.wait_for_function("fetch('/healthz').then(answer => answer.ok)")
        session.rollback()
        job = session.scalars(select(Job)).one()
        assert tutorial.tune(session, user).id == job.id, "a second click orders nothing"
        while session.scalars(select(Dataset.status)).one() != "ready":
            session.rollback()
            page.wait_for_timeout(50)
    session.refresh(job)
    tuned = carry_out(session, data_dir, job)
    assert tuned.kind == "instruction" and tuned.base_id == generic.id
    page.locator(".kinds > li").nth(1).get_by_role("link", name="Ask it").wait_for()
    page.get_by_role("link", name="Ask 2 models").wait_for()  # the whole page has changed, not the step alone
    page.get_by_text("trained in").wait_for()
    assert "predicted" in page.locator(".kinds > li").nth(1).inner_text() and "same" not in tutorial.steps(session, user)[2].says
    page.get_by_role("button", name="Add it").click()
    page.get_by_text(f"{tutorial.DIALOGUE} is being downloaded.").wait_for()
    arrive(session, tutorial.DIALOGUE, "dialogue")
    page.get_by_role("link", name="Ask it").nth(2).wait_for()
    page.reload()
    look_at(page, "kinds", tmp_path)
    page.get_by_role("link", name="Ask 3 models").click()
    assert page.locator("[data-pane]").evaluate_all("panes => panes.map(pane => pane.dataset.kind)") == [
        "generic",
        "instruction",
        "dialogue",
    ]
    assert page.get_by_label("Prompt", exact=True).input_value() == tutorial.QUESTION
