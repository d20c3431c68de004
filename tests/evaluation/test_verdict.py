"""What a job's page says came of it: planted outcomes, each told by its word, its sentence and what to try next."""

from __future__ import annotations

import uuid

import numpy as np
import pytest

from app.evaluation.verdict import overfitted, still_falling, verdict
from app.kit import stats
from app.shapes import shape_of
from app.spec import DatasetRef, JobSpec, ModelRef, RunSettings
from app.strategies import STRATEGIES
from worker.scoring.metrics import contest, difference_interval, paired_hits, paired_losses

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 512}
SHAPE = shape_of({"model_type": "llama", "max_position_embeddings": 256, "num_key_value_heads": 2, **SIZES})
FALLING = [[0, 3.0], [20, 2.2], [40, 1.9], [60, 1.4]]
SETTLED = [[0, 3.0], [20, 1.6], [40, 1.41], [60, 1.4]]
RISING = [[0, 3.0], [10, 2.8], [20, 3.1], [30, 3.6]]


def spec(task: str = "generation", strategy: str = "lora", **run) -> JobSpec:
    model = ModelRef(id=uuid.uuid4(), name="base", kind="dialogue", path="models/base", revision="0" * 64, shape=SHAPE)
    data = DatasetRef(id=uuid.uuid4(), name="rows", path="rows/r.parquet", sha256="0" * 64, format="chat", rows=100)
    return JobSpec(name="a job", task=task, model=model, dataset=data, run=RunSettings(**run), strategy=STRATEGIES[strategy]())


def losses(gain: float, rows: int = 40, noise: float = 0.2, seed: int = 0) -> dict:
    draw = np.random.default_rng(seed)
    base = draw.uniform(2.5, 3.5, rows)
    return paired_losses(base, base - gain + draw.normal(0, noise, rows))


def hits(base: float, tuned: float, rows: int = 50) -> dict:
    order = np.arange(rows)
    return paired_hits(order < base * rows, order[::-1] < tuned * rows)


def found(base: dict, few_shot: dict | None = None, curve=SETTLED, steps: int = 60, metric: str = "loss", **facts) -> dict:
    return {"contest": contest(metric, base, few_shot, examples=4, **facts), "curve": curve, "steps": steps}


PLANTED = {
    "better": (found(losses(1.5), losses(0.8)), "better", "Better than the base. Validation loss", []),
    "better, and still falling": (found(losses(1.5), losses(0.8), FALLING), "better", "more epochs would likely help", ["Train for 6 epochs"]),
    "worse than the base": (found(losses(-0.5), curve=RISING), "worse", "do not use this result", ["Try again with learning rate 0.0002"]),
    "equal within noise": (found(losses(0.01, noise=0.5)), "no_better", "No better than the base, as far as 40 rows can tell", []),
    "few-shot better": (found(losses(1.0), losses(-0.6)), "no_better", "the base with 4 examples in its prompt does better still", []),
    "few-shot as good": (found(losses(1.0), losses(0.0, noise=0.5)), "better", "a prompt may be enough", []),
    "too few rows": (found(losses(0.4, rows=4)), "too_few_rows", "Too few validation rows to tell (n = 4)", ["Hold out 20% of the rows"]),
    "too few for a small gain": (
        found(hits(0.4, 0.6, rows=10), metric="accuracy"), "too_few_rows", "Too few validation rows to tell (n = 10)", ["Hold out 20% of the rows"],
    ),
    "overfitted": (found(losses(0.02, noise=0.5), curve=RISING), "overfitted", "lowest at step 10 and rose again", ["Try again with learning rate 0.0002"]),
    "undertrained": (found(losses(0.05, noise=0.5), curve=[], steps=6), "undertrained", "6 steps are few", ["Train for 30 epochs"]),
    "perfect": (found(hits(0.3, 1.0), hits(0.7, 1.0), metric="accuracy"), "better", "Not one mistake", []),
    "one step": (found(losses(0.05, noise=0.5), curve=[], steps=1), "undertrained", "1 step is few", []),
    "worse than a guess": (found(hits(0.7, 0.3), metric="accuracy"), "worse", "Always answering the commonest label does better", []),
    "neighbors better": (
        found(hits(0.3, 0.7), hits(0.95, 0.7), metric="accuracy", few_shot_by="vectors"), "no_better",
        "Better than the base, but nearest-neighbor classification without training does better still: 96% against 70%.", [],
    ),
    "neighbors as good": (
        found(hits(0.3, 0.7), hits(0.72, 0.7), metric="accuracy", few_shot_by="vectors"), "better", "no training may be needed", [],
    ),
    "neighbors beaten": (
        found(hits(0.3, 0.9), hits(0.5, 0.9), metric="accuracy", few_shot_by="vectors", cross_validated=True), "better",
        "(difference +38 to +75 points with 95% confidence, 50 rows in cross-validation). Better than nearest-neighbor classification "
        "without training, too (50%).", [],
    ),
    "nothing held out": ({}, "too_few_rows", "No rows were held out", ["Hold out 20% and train again"]),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTED)
def test_each_planted_outcome_is_told(name):
    evaluation, outcome, sentence, suggested = PLANTED[name]
    told = verdict("succeeded", spec("classification" if "accuracy" in str(evaluation) else "generation"), evaluation)
    assert told is not None and told.outcome == outcome, told
    assert sentence in told.sentence
    assert [s.label for s in told.suggestions][: len(suggested)] == suggested
    assert told.ready == (outcome == "better")


def test_a_job_that_a_limit_ended_is_offered_a_higher_limit():
    """The quick preset ends after 25 steps: more epochs alone would end there again."""
    for evaluation in (found(losses(0.05, noise=0.5), curve=[], steps=25), found(losses(1.0), losses(-0.6), steps=25)):
        (offered,) = verdict("succeeded", spec(max_steps=25, epochs=3), evaluation).suggestions
        assert offered.label == "Train for 60 steps" and offered.order == {"run": {"epochs": 8, "max_steps": 60}}


FORGOT = {"verdict": "forgot much", "change": 0.2, "interval": [0.16, 0.24]}


def test_what_was_forgotten_is_part_of_the_verdict_and_reads_forwards():
    told = verdict("succeeded", spec(), found(losses(1.5), losses(0.8)), forgetting=FORGOT)
    assert told.outcome == "better"
    assert told.sentence.endswith("It forgot much: general ability −20% (95%: −24 to −16%), with the adapter on; removable.")
    whole = verdict("succeeded", spec(strategy="full"), found(losses(1.5), losses(0.8)), forgetting=FORGOT)
    assert whole.sentence.endswith("(95%: −24 to −16%).")
    for little in (None, FORGOT | {"verdict": "within noise"}, {"verdict": "not applicable", "change": None, "interval": None}):
        assert "forgot" not in verdict("succeeded", spec(), found(losses(1.5), losses(0.8)), forgetting=little).sentence


def test_a_diverged_job_offers_a_lower_rate_and_an_interrupted_one_says_so():
    told = verdict(
        "failed", spec(learning_rate=0.01), None, {"code": "diverged", "message": "The loss rose.", "suggestion": {"learning_rate": 0.001}}
    )
    assert told.outcome == "diverged" and told.suggestions[0].order == {"run": {"learning_rate": 0.001}}
    assert "learning rate 0.001" in told.suggestions[0].label
    stopped = verdict("cancelled", spec(), None, None, step=5)
    assert stopped.outcome == "undertrained" and "Cancelled at step 5" in stopped.sentence
    assert verdict("failed", spec(), None, {"code": "disk_full"}) is None and verdict("running", spec(), None) is None
    assert verdict("succeeded", spec(), {"tuned": {"loss": 1.0}}) is None, "a job of an earlier version is not judged"


def test_the_figures_are_those_of_the_same_rows():
    told = verdict("succeeded", spec(), found(losses(1.5), losses(0.8)))
    low, high = told.interval
    assert low < told.tuned - told.base < high < 0 and told.n == 40 and told.metric == "loss"
    assert told.few_shot is not None and told.tuned < told.few_shot


def test_weights_make_the_means_those_of_all_tokens():
    told = paired_losses([1.0, 3.0], [1.0, 1.0], [300, 100])
    assert told["one"] == pytest.approx((300 * 1 + 100 * 3) / 400) and told["other"] == pytest.approx(1.0)


def test_intervals_of_paired_shares_hold_in_a_simulation():
    """Newcombe's interval covers the true difference in about 95 of 100 samples, also for few rows and shares near one."""
    draw = np.random.default_rng(1)
    for rows, base, tuned in ((10, 0.3, 0.8), (30, 0.5, 0.6), (50, 0.85, 0.95)):
        inside = 0
        for _ in range(400):
            a, b = draw.random(rows) < base, draw.random(rows) < tuned
            low, high = paired_hits(a, b)["interval"]
            inside += low <= tuned - base <= high
        assert inside / 400 > 0.92, (rows, base, tuned, inside / 400)
    assert stats.paired_shares(0, 5, 0, 0)[0] > 0, "five of five against none is no chance"
    low, high = stats.paired_shares(3, 0, 0, 2)
    assert low < 0 < high, "equal answers differ by chance alone"


def test_curves_that_fall_and_that_rise_again():
    assert still_falling(FALLING) and not still_falling(SETTLED) and not still_falling(RISING) and not still_falling([])
    assert overfitted(RISING) == 10 and overfitted(SETTLED) is None and overfitted([[0, 2.0], [1, 1.9]]) is None


def test_shares_of_a_loss_without_a_reference_are_compared_with_the_base():
    """Newcombe's interval of two shares is that of paired ones which have nothing to do with each other."""
    one = np.repeat([1, 1, 0, 0], [40, 10, 40, 10])
    other = np.repeat([1, 0, 1, 0], [40, 10, 40, 10])  # 0.5 and 0.8 right, independent
    paired = paired_hits(one, other)
    interval = difference_interval(0.5, 0.8, 100)
    assert interval == pytest.approx(paired["interval"], rel=1e-4) and interval[0] < 0.3 < interval[1]
    found = contest("ranking_accuracy", {"rows": 100, "one": 0.5, "other": 0.8, "interval": interval})
    told = verdict("succeeded", spec(), {"contest": found, "rows": 100, "steps": 60})
    assert told.outcome == "better" and "Preference accuracy 80% against 50% of the base" in told.sentence
