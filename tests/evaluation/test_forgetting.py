"""The verdict on forgetting: noise is called noise, and loss is called loss."""

from __future__ import annotations

import random

import pytest

from app.evaluation.forgetting import TextScore, bits_per_byte, compare

SKILLS = ("facts", "code")


def scores(factor: float, noise: float, seed: int = 1) -> list[TextScore]:
    draw, shake = random.Random(1), random.Random(seed)
    texts = [(skill, draw.uniform(40, 160), draw.randint(60, 200)) for skill in SKILLS for _ in range(12)]
    return [TextScore(s, nats * factor * (1 + shake.gauss(0, noise)), size) for s, nats, size in texts]


def test_equal_scores_are_no_forgetting():
    same = compare(scores(1, 0), scores(1, 0))
    assert same.change == 0
    assert same.verdict == "within noise"


def test_a_change_smaller_than_its_spread_is_noise():
    assert compare(scores(1, 0), scores(1.002, 0.05, seed=3)).verdict == "within noise"


@pytest.mark.parametrize(("factor", "verdict"), [(0.95, "gained"), (1.012, "forgot a little"), (1.06, "forgot some"), (1.5, "forgot much")])
def test_a_steady_change_is_named_by_its_size(factor, verdict):
    found = compare(scores(1, 0), scores(factor, 0.002))
    assert found.verdict == verdict
    assert found.interval[0] < found.change < found.interval[1]


def test_the_skill_that_suffered_is_named():
    before = scores(1, 0)
    after = [s._replace(nats=s.nats * 1.4) if s.skill == "code" else s for s in before]
    found = compare(before, after)
    assert "code" in found.sentence
    assert found.skills["facts"].change == 0
    assert found.skills["code"].change == pytest.approx(0.4)


def test_bits_per_byte_by_hand():
    assert bits_per_byte([TextScore("facts", 0.6931471805599453 * 16, 8)]) == pytest.approx(2)


def test_different_texts_are_refused():
    with pytest.raises(ValueError, match="same texts"):
        compare(scores(1, 0), scores(1, 0)[:-1])
