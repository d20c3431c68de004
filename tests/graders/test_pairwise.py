"""A judge that compares two answers in both orders: what is decided by the answers, and what by their position."""

from __future__ import annotations

import pytest

from app import graders
from app.graders import PairVerdict, Reply, self_agreement
from app.kit import stats
from app.views import grader as grader_view
from app.views.grader import TrialRow

JUDGE = graders.read(
    {"type": "score_model", "name": "judge", "model": "m", "input": [{"role": "system", "content": "Like {{item.reference}}?"}, {"role": "user", "content": "Grade this.\n{{sample.output_text}}"}],
     "range": [1, 7], "sampling_params": {"temperature": 0.5, "seed": 3, "max_completions_tokens": 20}}
)  # fmt: skip
ITEM = {"reference": "maple"}


def both_orders(answer, first="Spruce.", second="Maple."):
    asked = []

    def hear(ask):
        asked.append(ask)
        return Reply(text=answer(ask.messages[-1]["content"]), tokens=3, model="m")

    return graders.compare(JUDGE, ITEM, first, second, hear), asked


def by_content(text: str) -> str:
    """A judge that reads: the answer with maple is better, wherever it is."""
    return '{"result": "1"}' if text.index("Maple") < text.index("Spruce") else 'Thinking.\n{"result": 2}'


def test_the_judge_is_asked_twice_by_its_own_criteria_with_the_sides_swapped():
    found, (straight, swapped) = both_orders(by_content)
    assert found == PairVerdict("second", "second") and (found.winner, found.position) == ("second", None)
    assert straight.messages[0] == swapped.messages[0] == {"role": "system", "content": "Like maple?"}
    said = [ask.messages[1]["content"] for ask in (straight, swapped)]
    assert said[0].startswith("Grade this.\nAnswer 1:\nSpruce.\n\nAnswer 2:\nMaple.\n\n")
    assert said[1].startswith("Grade this.\nAnswer 1:\nMaple.\n\nAnswer 2:\nSpruce.\n\n") and 'result": "tie"' in said[1]
    assert "NUMBER" not in said[0] and (straight.temperature, straight.seed, straight.max_tokens) == (0.5, 3, 20)


@pytest.mark.parametrize(
    ("answer", "winner", "position"),
    [
        (lambda text: "1", None, 1),
        (lambda text: "Answer 2 is better", None, 2),
        (lambda text: '{"result": "tie"}', "tie", None),
        (lambda text: "tie" if text.index("Maple") < text.index("Spruce") else "1", None, None),
    ],
    ids=["front", "back", "tie", "once"],
)
def test_what_does_not_survive_the_swap_is_no_win(answer, winner, position):
    found, _ = both_orders(answer)
    assert (found.winner, found.position) == (winner, position)


def test_a_verdict_that_is_none_says_why():
    found, _ = both_orders(lambda text: "Both are nice.")
    assert found.straight is found.swapped is found.winner is found.position is None and "named none of the two" in found.why
    half, _ = both_orders(lambda text: "1" if text.index("Maple") < text.index("Spruce") else "What?")
    assert (half.straight, half.swapped, half.winner) == (None, "second", None) and half.why


def test_agreement_with_itself_is_counted_with_its_interval():
    rows = [PairVerdict("first", "first")] * 5 + [PairVerdict("tie", "tie")] + [PairVerdict("first", "second")] * 3
    rows += [PairVerdict("second", "first"), PairVerdict("tie", "first"), PairVerdict(None, "first", "no")]
    found = self_agreement(rows)
    assert found is not None
    assert (found.rows, found.agreed, found.by_position, found.first_place, found.wins, found.failed) == (11, 6, 4, 3, (5, 0, 1), 1)
    assert (found.low, found.high) == stats.wilson(6, 11)
    assert self_agreement([PairVerdict(None, None, "no")]) is None


def test_the_page_and_the_api_tell_the_same():
    found = [
        PairVerdict("first", "first"),
        PairVerdict("second", "first"),
        PairVerdict("tie", "first"),
        PairVerdict("tie", "tie"),
        PairVerdict(None, "tie", "why"),
    ]
    rows = [TrialRow(line, "?", "", {}, f"answer {line}") for line in range(1, 6)]
    shown = grader_view.compared(("ada", "bea"), rows, rows, found)
    assert [row.verdict for row in shown.rows] == [
        "ada",
        "decided by position: answer 2 in both orders",
        "a tie in one order and not in the other",
        "a tie",
        "",
    ]
    told = grader_view.comparison_json(found)
    assert shown.agreement == self_agreement(found) and shown.rows[-1].why == told["rows"][-1]["error"] == "why"
    assert told["agreement"] == {
        "rows": 4, "agreed": 2, "share": 0.5, "interval": stats.wilson(2, 4), "by_position": 1, "first_place": 0,
        "wins": {"first": 1, "second": 0, "tie": 1}, "failed": 1,
    }  # fmt: skip
    assert [(row["winner"], row["position"]) for row in told["rows"]] == [
        ("first", None),
        (None, 2),
        (None, None),
        ("tie", None),
        (None, None),
    ]
