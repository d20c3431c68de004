"""The advice follows the facts, and says why."""

from __future__ import annotations

from app.advisor import Cost, Facts, advise, worth_tuning
from app.shapes import shape_of
from app.strategies import STRATEGIES

DECODER = shape_of(
    {"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
     "num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 8192, "tie_word_embeddings": True}
)  # fmt: skip
ENCODER = shape_of(
    {"model_type": "bert", "hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 12,
     "vocab_size": 30522, "max_position_embeddings": 512, "type_vocab_size": 2}
)  # fmt: skip
GB = 10**9


def ranked(facts: Facts, shape=DECODER, costs=None):
    return [a for a in advise(facts, shape, costs or {}) if a.available]


def test_every_strategy_has_a_place_and_those_that_cannot_run_say_why():
    found = advise(Facts(task="generation", rows=500, memory_bytes=24 * GB), DECODER, {})
    assert {a.strategy for a in found} == set(STRATEGIES)
    assert all(a.reason for a in found if not a.available)
    assert [a.available for a in found] == sorted((a.available for a in found), reverse=True)
    assert [a.strategy for a in found if a.advised] == [found[0].strategy]


def test_a_usual_chat_set_gets_lora():
    assert ranked(Facts(task="generation", rows=1200, distance=1.3, memory_bytes=24 * GB))[0].strategy == "lora"


def test_labels_and_a_close_task_get_frozen_features():
    best = ranked(Facts(task="classification", rows=770, classes=77, distance=1.0, memory_bytes=24 * GB), ENCODER)[0]
    assert best.strategy == "feature_extraction"
    assert any("770 labelled rows" in text for text in best.reasons)


def test_a_large_labelled_set_lifts_the_dense_head():
    def place(rows: int) -> int:
        order = ranked(Facts(task="classification", rows=rows, classes=10, memory_bytes=24 * GB), ENCODER)
        return [a.strategy for a in order].index("dense_head")

    assert place(20_000) < place(200)


def test_far_data_with_room_gets_full_and_is_warned_of_forgetting():
    best = ranked(Facts(task="generation", rows=50_000, distance=2.5, memory_bytes=80 * GB))[0]
    assert best.strategy == "full"
    assert any("forgets" in text for text in best.warnings)


def test_what_does_not_fit_cannot_be_advised():
    costs = {name: Cost(memory_bytes=9 * GB, trainable_parameters=1) for name in STRATEGIES}
    found = advise(Facts(task="generation", rows=1000, memory_bytes=8 * GB), DECODER, costs)
    assert not any(a.available for a in found)
    assert all("8.0 GB" in a.reason for a in found if STRATEGIES[a.strategy]().unavailable(DECODER) is None)


def test_a_close_task_lifts_frozen_features_and_a_strange_one_lowers_them():
    def score(**measured) -> int:
        facts = Facts(task="classification", rows=770, classes=7, memory_bytes=24 * GB, metric="accuracy", how="vectors", **measured)
        return next(a for a in ranked(facts, ENCODER) if a.strategy == "feature_extraction").score

    close, between, strange = score(prompted=0.8, chance=0.2), score(prompted=0.5, chance=0.2), score(prompted=0.25, chance=0.2)
    assert close > between > strange


def test_where_a_prompt_is_enough_moving_every_weight_is_advised_against():
    def full(**measured):
        facts = Facts(task="generation", rows=9000, memory_bytes=80 * GB, metric="rouge_l", how="answers", **measured)
        return next(a for a in ranked(facts) if a.strategy == "full")

    assert full(prompted=0.9).score < full(prompted=0.3).score
    assert any("ROUGE-L 0.90" in text for text in full(prompted=0.9).warnings)
    assert worth_tuning(Facts(task="generation", rows=9, memory_bytes=GB)) is None


def classes(rows: int, **more) -> Facts:
    return Facts(**{"task": "classification", "rows": rows, "classes": 10, "memory_bytes": 24 * GB, **more})


def test_a_large_labelled_set_gets_the_dense_head_first():
    best = ranked(classes(20_000, smallest_class=900, largest_class=4000), ENCODER)[0]
    assert best.strategy == "dense_head" and any("900 in the smallest" in text for text in best.reasons)
    assert ranked(classes(20_000, distance=1.0), DECODER)[0].strategy == "dense_head"
    assert ranked(classes(300), ENCODER)[0].strategy == "feature_extraction"


def test_a_frozen_model_that_tells_no_class_apart_gets_no_new_layers():
    strange = classes(20_000, metric="accuracy", how="vectors", prompted=0.12, chance=0.1)
    assert ranked(strange, ENCODER)[0].strategy == "lora"


def test_the_smallest_class_decides_what_is_enough():
    even, uneven = classes(20_000, smallest_class=2000, largest_class=2000), classes(20_000, smallest_class=4, largest_class=15_000)
    best = ranked(uneven, ENCODER)[0]
    assert ranked(even, ENCODER)[0].strategy == "dense_head" and best.strategy == "feature_extraction"
    lora = next(a for a in ranked(uneven, ENCODER) if a.strategy == "lora")
    assert any("4 in the smallest are few" in text for text in lora.warnings)
    assert any("3,750 times the rows of the smallest" in text and "macro F1" in text for text in lora.warnings)


def test_short_memory_gets_the_parameter_efficient_strategy_that_needs_least():
    """Full re-training has no room, LoRA fits by computing layers twice, and prompt tuning as it is."""

    def cost(memory: float, recomputed: int = 0) -> Cost:
        return Cost(memory_bytes=int(memory * GB), trainable_parameters=1, learning_bytes=GB, recomputed_layers=recomputed)

    names = ("lora", "rslora", "ia3", "prompt_tuning", "dense_head")
    short = {
        **{name: cost(3.6, 12) for name in STRATEGIES},
        "full": cost(9, 30),
        "prompt_tuning": cost(3.0),
        "ia3": cost(3.2),
        "dense_head": cost(2),
    }
    facts = Facts(task="generation", rows=1200, distance=1.5, memory_bytes=4 * GB)
    best = ranked(facts, costs=short)[0]
    assert best.strategy == "prompt_tuning" and any(
        "needs the least: 3.0 GB, of which gradients and activations are 1.0 GB" in t for t in best.reasons
    )
    place = {a.strategy: n for n, a in enumerate(ranked(facts, costs=short)) if a.strategy in names}
    assert place["ia3"] < place["lora"] and "full" not in place
    assert any("12 layers are computed twice" in t for a in ranked(facts, costs=short) if a.strategy == "lora" for t in a.warnings)
    roomy = {name: cost(2) for name in STRATEGIES}
    assert ranked(facts, costs=roomy)[0].strategy == "lora"
    near = {**short, "lora": cost(3.2)}
    assert ranked(facts, costs=near)[0].strategy == "lora", "where it needs hardly more it is still the surest"
