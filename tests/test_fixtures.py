"""The fixtures themselves: a small model that is real, and databases that do not see each other."""

from __future__ import annotations

import pytest
from sqlalchemy import select

from app.db import transaction
from app.shapes import Shape
from app.tables import User


@pytest.mark.parametrize("round_", [1, 2])
def test_each_test_has_a_database_of_its_own(session, round_):
    with transaction() as other:
        assert other.scalars(select(User)).all() == []
        other.add(User(name="somebody"))
    assert [user.name for user in session.scalars(select(User))] == ["somebody"]


def test_the_schema_is_what_the_tables_say(session):
    from alembic.autogenerate import compare_metadata
    from alembic.runtime.migration import MigrationContext

    from app.tables import Base

    context = MigrationContext.configure(session.connection(), opts={"compare_type": True, "compare_server_default": True})
    assert compare_metadata(context, Base.metadata) == []


def test_the_tiny_model_is_real(tiny_registered, tiny_model):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(tiny_model), AutoModelForCausalLM.from_pretrained(tiny_model)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert 90_000 < count < 120_000
    assert Shape.model_validate(tiny_registered.shape).parameters() == count

    messages = [{"role": "user", "content": "Which wood?"}, {"role": "assistant", "content": "Maple, größer ✓"}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    assert rendered == "<|im_start|>user\nWhich wood?<|im_end|>\n<|im_start|>assistant\nMaple, größer ✓<|im_end|>\n"
    ids = tokenizer(rendered, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == rendered
    assert ids.count(tokenizer.eos_token_id) == 2
    answer = model.generate(**tokenizer("Which", return_tensors="pt"), max_new_tokens=4, do_sample=False)
    assert answer.shape[1] > 1
