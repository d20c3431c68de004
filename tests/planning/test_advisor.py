"""The advice follows the facts, and says why."""

from __future__ import annotations

from app.evaluation.advice_cards import cards
from app.kit.humanize import human_count
from app.planning.advisor import FIRST, CostEstimate, advise, details, groups, rules
from app.shapes import shape_of
from app.strategies import STRATEGIES
from app.strategies._advice import FAMILIES, Facts, Reason, worth_tuning

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
    assert any("770 labeled rows" in text for text in best.reasons)


def test_a_large_labelled_set_lifts_the_dense_head():
    def place(rows: int) -> int:
        order = ranked(Facts(task="classification", rows=rows, classes=10, memory_bytes=24 * GB), ENCODER)
        return [a.strategy for a in order].index("dense_head")

    assert place(20_000) < place(200)


def test_far_data_with_room_gets_full_and_is_warned_of_forgetting():
    best = ranked(Facts(task="generation", rows=50_000, distance=2.5, memory_bytes=80 * GB))[0]
    assert best.strategy == "full"
    assert any("forgets" in text for text in best.warnings)


def test_no_sentence_is_said_of_two_methods_and_every_point_is_accounted_for():
    costs = {
        name: CostEstimate(memory_bytes=(n + 1) * GB // 10, seconds=60 + n, trainable_parameters=n) for n, name in enumerate(STRATEGIES)
    }
    for facts, shape in (
        (Facts(task="generation", rows=60, distance=1.0, memory_bytes=24 * GB), DECODER),
        (Facts(task="generation", rows=9000, distance=2.5, memory_bytes=24 * GB, metric="rouge_l", prompted=0.9), DECODER),
        (classes(20_000, smallest_class=4, largest_class=15_000), ENCODER),
    ):
        found = advise(facts, shape, costs)
        said = [text for a in found for text in (*a.reasons, *a.warnings)]
        together = [rule.text for rule in rules(found)]
        assert len(said) == len(set(said)) and len(together) == len(set(together)) and not set(said) & set(together)
        for a in found:
            shared = sum(rule.points for rule in rules(found) if a.strategy in rule.strategies)
            own = sum(r.points for r in a._weighed if r.text in (*a.reasons, *a.warnings))
            assert a.score == shared + own


def test_the_first_places_are_told_in_full_and_the_others_by_family_without_a_sentence_twice():
    costs = {
        name: CostEstimate(memory_bytes=(n + 10) * GB // 10, seconds=60 + n, trainable_parameters=1000 * (n + 1))
        for n, name in enumerate(STRATEGIES)
    }
    facts = Facts(task="generation", rows=1200, tokens=90_000, distance=1.4, memory_bytes=24 * GB)
    found = ranked(facts, costs=costs)
    told, chosen = details(found), cards(found, facts, "m", "ds-1")
    assert [one.strategy for one in told] == [a.strategy for a in found[:FIRST]]
    assert all(one.speaks_for for one in told), "each has something of its own, by numbers"
    for place, (one, advice) in enumerate(zip(told, found, strict=False)):
        before = {r.text for earlier in told[:place] for r in (*earlier.speaks_for, *earlier.against)}
        said = {r.text for r in (*one.speaks_for, *one.against)}
        assert said | before >= {r.text for r in advice._weighed}, "nothing that counts is left out"
        assert any(f"parameters on {human_count(90_000)} tokens" in text for text in said)
    folded = groups(found)
    assert {s for g in folded for s in g.strategies} == {a.strategy for a in found[FIRST:]}
    assert {g.title for g in folded} <= set(FAMILIES.values()) and all("×" in g.difference for g in folded)
    own = [text for a in found[FIRST:] for text in (*a.reasons, *a.warnings)]
    sentences = [r.text for one in told for r in (*one.speaks_for, *one.against)] + own
    sentences += [one.difference for one in told if one.difference] + [g.difference for g in folded]
    assert len(sentences) == len(set(sentences)) > 15
    assert all(one.score == one.above + sum(r.points for r in (*one.speaks_for, *one.against)) for one in told), "every point is told"
    assert told[0].above == 0 and chosen[0].sentence in [r.text for r in told[0].speaks_for]
    assert found[0].difference is None and "as many parameters as LoRA" in found[1].difference


def test_what_past_runs_measured_counts_and_is_said():
    facts = Facts(task="generation", rows=1200, distance=1.3, memory_bytes=24 * GB)
    plain, known = (advise(facts, DECODER, {}, past=past) for past in (None, {"dora": Reason(30, "Measured here: 3 runs …")}))
    assert plain[0].strategy == "lora" and known[0].strategy == "dora"
    assert "Measured here: 3 runs …" in known[0].reasons


def test_the_cards_are_a_recommended_a_cheaper_and_a_stronger_choice():
    def cost(memory: float, trained: int) -> CostEstimate:
        return CostEstimate(memory_bytes=int(memory * GB), seconds=60 * memory, trainable_parameters=trained)

    costs = {name: cost(3, 1000) for name in STRATEGIES} | {"full": cost(8, 135_000_000), "prompt_tuning": cost(2, 100)}
    facts = Facts(task="generation", rows=1200, memory_bytes=24 * GB)
    found = cards(ranked(facts, costs=costs), facts, "m", "ds-1")
    assert [(c.kind, c.strategy) for c in found] == [("recommended", "lora"), ("cheaper", "prompt_tuning"), ("stronger", "full")]
    assert "2 GB instead of 3 GB and 2 min instead of 3 min" in found[1].sentence
    assert all(c.label == "Use this method" and f"strategy={c.strategy}" in c.url for c in found)
    slow = costs | {"prompt_tuning": CostEstimate(memory_bytes=2 * GB, seconds=179, trainable_parameters=100)}
    said = cards(ranked(facts, costs=slow), facts, "m", "ds-1")[1].sentence
    assert said == "Takes 2 GB instead of 3 GB, for somewhat less capacity than LoRA.", "a second less is no reason"
    enough = facts.model_copy(update={"metric": "rouge_l", "prompted": 0.9, "how": "answers"})
    first = cards(ranked(enough, costs=costs), enough, "m", "ds-1")[0]
    assert first.strategy is None and "ROUGE-L 0.90" in first.sentence and first.url.startswith("/playground/prompts/new?builder=few_shot")


def test_what_does_not_fit_cannot_be_advised():
    costs = {name: CostEstimate(memory_bytes=9 * GB, trainable_parameters=1) for name in STRATEGIES}
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
    against_lora = [rule.text for rule in rules(ranked(uneven, ENCODER)) if "lora" in rule.strategies and rule.points < 0]
    assert any("4 in the smallest are few" in text for text in against_lora)
    assert any("3,750 times the rows of the smallest" in text and "macro F1" in text for text in against_lora)


def test_short_memory_gets_the_parameter_efficient_strategy_that_needs_least():
    """Full re-training has no room, LoRA fits by computing layers twice, and prompt tuning as it is."""

    def cost(memory: float, recomputed: int = 0) -> CostEstimate:
        return CostEstimate(memory_bytes=int(memory * GB), trainable_parameters=1, learning_bytes=GB, recomputed_layers=recomputed)

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
    assert any("12 layers are recomputed" in rule.text for rule in rules(ranked(facts, costs=short)) if "lora" in rule.strategies)
    roomy = {name: cost(2) for name in STRATEGIES}
    assert ranked(facts, costs=roomy)[0].strategy == "lora"
    near = {**short, "lora": cost(3.2)}
    assert ranked(facts, costs=near)[0].strategy == "lora", "where it needs hardly more it is still the surest"
