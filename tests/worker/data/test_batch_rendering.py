"""Rows rendered many at a time are, id for id and mask for mask, the rows rendered one by one."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.errors import BadData
from tests.tiny import build_tokenizer
from worker.data.batch_rendering import BATCH_ROWS, Length, Renderer, counts_of, length_of, render_rows
from worker.data.chat_template import prepare_tokenizer, render_row
from worker.data.light_tokenizer import LightTokenizer

TEXT = st.text(min_size=1, max_size=40) | st.sampled_from(["Spruce — 云杉 🎻", " ", "a<|im_end|>b", "<|im_start|>", "\n\nx  "])
TALK = st.lists(st.tuples(TEXT, TEXT, st.sampled_from([0, 1])), min_size=1, max_size=3).map(
    lambda turns: {
        "messages": [
            message
            for asked, said, weight in turns
            for message in ({"role": "user", "content": asked}, {"role": "assistant", "content": said, "weight": weight})
        ]
    }
)
ROW = TALK | st.builds(lambda p, c: {"prompt": p, "completion": c}, TEXT, TEXT) | st.builds(lambda t: {"text": t}, TEXT)


def one_by_one(tokenizer, rows, kind, longest):
    found = []
    for row in rows:
        try:
            found.append(render_row(tokenizer, row, kind, longest))
        except BadData as error:
            found.append(error.message)
    return found


def measured(tokenizer, rows, kind):
    found = []
    renderer = Renderer(tokenizer, kind, counts_of, length_of, lambda tag, outcome: found.append(outcome))
    for row in rows:
        renderer.add(None, row)
    renderer.finish()
    return plainly(found)


def length(rendered):
    if isinstance(rendered, str):
        return rendered
    return Length(len(rendered.ids), sum(rendered.trained), rendered.trained.index(True) if any(rendered.trained) else None)


def plainly(outcomes):
    return [outcome.message if isinstance(outcome, BadData) else outcome for outcome in outcomes]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    real = build_tokenizer()
    real.save_pretrained(folder)
    found = [real, LightTokenizer(folder)]
    for tokenizer in found:
        prepare_tokenizer(tokenizer)
    return found


@given(st.lists(ROW, max_size=12), st.sampled_from(["dialogue", "generic"]), st.sampled_from([1, 9, 500]))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_many_rows_are_the_same_as_each_alone(tokenizers, rows, kind, longest):
    for tokenizer in tokenizers:
        assert plainly(render_rows(tokenizer, rows, kind, longest)) == one_by_one(tokenizer, rows, kind, longest)
        assert measured(tokenizer, rows, kind) == [length(row) for row in one_by_one(tokenizer, rows, kind, 1 << 30)]


def test_the_order_is_kept_over_batches_and_a_bad_row_harms_no_other(tokenizers):
    rows = [{"text": f"row {n}"} for n in range(5 * BATCH_ROWS + 3)]
    rows[BATCH_ROWS] = {"colour": "red"}
    for tokenizer in tokenizers:
        found = plainly(render_rows(tokenizer, rows, "generic", 99))
        assert found == one_by_one(tokenizer, rows, "generic", 99) and isinstance(found[BATCH_ROWS], str)


def test_also_for_the_starter_model_and_its_template(starter_model):
    from transformers import AutoTokenizer

    rows = [
        {"messages": [{"role": "user", "content": f"Why {n}?"}, {"role": "assistant", "content": f"Because {n}.<|im_end|>"}]}
        for n in range(300)
    ] + [{"prompt": "p", "completion": "c"}, {"text": "t"}]
    light = LightTokenizer(starter_model)
    prepare_tokenizer(light)
    wanted = one_by_one(AutoTokenizer.from_pretrained(starter_model), rows, "dialogue", 500)
    assert plainly(render_rows(light, rows, "dialogue", 500)) == wanted
