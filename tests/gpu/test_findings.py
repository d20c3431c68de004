"""What a review of the CUDA paths found, each in a case that fails without its mend."""

from __future__ import annotations

import pytest

from tests.gpu.conftest import FakeGpu

T4 = {"bf16": False, "capability": [7, 5], "name": "Tesla T4"}


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["lora", "full"])
def test_a_card_without_bf16_trains_in_fp16(gpu: FakeGpu, strategy: str) -> None:
    """With a factor on the loss, none of which the host waits for, and without the attention that such a card has no kernel of."""
    found = gpu.run(strategy=strategy, precision="auto", card=T4)
    last = found["steps"][-1]
    assert (found["started"]["precision"], found["started"]["backend"]) == ("fp16", "loss_scaled") and not last["waits"]
    assert last["attention"] == 0 and last["operations"]["aten._amp_update_scale_"] == 1
    assert gpu.run(strategy=strategy, precision="fp32", card=T4)["started"]["precision"] == "fp32"


@pytest.mark.parametrize(("precision", "card"), [("auto", T4), ("fp32", {})])
def test_without_flash_attention_no_scores_are_written_out(gpu: FakeGpu, precision: str, card: dict[str, object]) -> None:
    """In fp16 before Ampere, and in float32 everywhere, the memory-efficient kernel is the only fused one, and takes no grouped heads."""
    found = gpu.run(strategy="lora", precision=precision, card=card)
    operations = found["steps"][-1]["operations"]
    assert operations["aten._scaled_dot_product_efficient_attention"] and not {"aten._softmax", "aten._safe_softmax"} & set(operations)


@pytest.mark.long
def test_pooling_costs_the_same_for_few_texts_and_for_many(gpu: FakeGpu) -> None:
    few, many = (
        gpu.run(family="bert", task="classification", run={"max_tokens_per_step": tokens}, rows=200)["steps"][-1] for tokens in (128, 1024)
    )
    assert many["launches"] <= few["launches"] + 5, "the number of texts in a pack shows"


def test_a_long_row_has_a_pack_of_its_own_shape(gpu: FakeGpu) -> None:
    """One row of 400 tokens among short ones: packs of 128 tokens stay packs of 128, instead of all being filled up to 400."""
    found = gpu.run(rows=96, long=1, run={"max_tokens_per_step": 128, "max_length": 512})
    short, long = found["frames"]
    assert short[0] == 128 and short[2] < 128 and long[0] == long[2] > found["longest"] - 64 > 300
    assert {step["tokens"] for step in found["steps"]} <= {128, long[0]} and 128 in {step["tokens"] for step in found["steps"]}
