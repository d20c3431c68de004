"""The fixtures themselves: a small model that is real, and databases that do not see each other."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from sqlalchemy import select

from app.db import transaction
from app.shapes import Shape
from app.tables import User
from tests.conftest import application, passed_on_the_second_try, where_the_time_went


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


def test_one_application_serves_test_after_test_until_one_adds_a_route(session):
    with application() as first:
        pass
    with application() as second:
        assert second is first
        second.get("/v1/unheard-of")(lambda: None)
    with application() as third:
        assert third is not first and "/v1/unheard-of" not in {getattr(route, "path", "") for route in third.routes}


class Terminal:
    """What a run's end is written to."""

    def __init__(self, second_try: bool, **stats: list) -> None:
        self.stats, self.written = stats | {"": stats.pop("quiet", [])}, []
        self.config = SimpleNamespace(getoption=lambda name, otherwise: second_try)

    def section(self, title: str) -> None:
        self.written.append(title)

    write_line = section


def test_the_files_that_take_most_cpu_are_named_first():
    def report(file: str, cpu: float) -> SimpleNamespace:
        return SimpleNamespace(nodeid=f"{file}::test", when="teardown", user_properties=[("seconds", [cpu, 2.0])])

    terminal = Terminal(False, quiet=[report("a.py", 1.0), report("b.py", 4.0), report("a.py", 1.5)])
    where_the_time_went(terminal)
    assert [line.split()[-1] for line in terminal.written[1:]] == ["files", "b.py", "a.py"]
    assert terminal.written[3].split()[0] == "2.5" and terminal.written[1].split()[0] == "6.5"


def test_what_passes_on_the_second_try_alone_is_named_with_its_reason():
    passed = [
        SimpleNamespace(nodeid="a.py::one", user_properties=[("flaky", "it is tired")]),
        SimpleNamespace(nodeid="a.py::two", user_properties=[]),
    ]
    first, second = Terminal(False, passed=passed), Terminal(True, passed=passed)
    passed_on_the_second_try(first)
    passed_on_the_second_try(second)
    assert not first.written
    assert "it is tired" in second.written[0] and "NOT KNOWN" in second.written[1]


def test_what_is_marked_flaky_says_why(request):
    for item in request.session.items:
        for mark in item.iter_markers("flaky"):
            assert len(mark.kwargs["reason"].split()) > 3, item.nodeid
