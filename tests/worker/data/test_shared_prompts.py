"""Answers that share the prompt of their pack: the same log-probabilities and gradients as answers with a prompt of their own each."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from worker.data.batching import Tokenised, make_batch
from worker.data.shared_prompts import bundles_batch, bundles_of
from worker.modeling import packed_attention
from worker.modeling.cross_entropy import head_of
from worker.modeling.token_logprobs import token_nats
from worker.runtime.device import Compute
from worker.scoring import held_out

CPU = Compute(torch.device("cpu"), "cpu", "fp32", torch.float32, 1)
PROMPTS, ANSWERS = [9, 1, 14], [[5, 1, 7], [3], [2, 9]]
GROUPS = [group for group, answers in enumerate(ANSWERS) for _ in answers]
SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "max_position_embeddings": 64, "initializer_range": 0.3,
}  # fmt: skip
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 6},
    "gemma2": {"sliding_window": 6, "attn_logit_softcapping": 2.0},
    "gpt2": {
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "resid_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "bos_token_id": None,
        "eos_token_id": None,
    },
}


def rows() -> Tokenised:
    """Answers with their prompts, whose third has a part in its middle that is not trained, as the result of a tool."""
    draw = np.random.default_rng(0)
    prompts = [draw.integers(0, 64, size) for size in PROMPTS]
    ids, trained = list[np.ndarray](), list[np.ndarray]()
    for group, answers in enumerate(ANSWERS):
        for size in answers:
            ids.append(np.concatenate([prompts[group], draw.integers(0, 64, size)]).astype(np.int32))
            trained.append(np.arange(len(ids[-1])) >= PROMPTS[group])
    trained[2][-4:-2] = False
    return Tokenised(
        np.concatenate(ids), np.concatenate(trained), np.cumsum([0, *map(len, ids)]).astype(np.int64), list(range(len(ids))), 0, []
    )


def model_of(family: str) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(SIZES | FAMILIES[family]), tie_word_embeddings=True)
    return AutoModelForCausalLM.from_config(config, attn_implementation=packed_attention.NAME).train()


def nats_and_gradients(model: Any, batch: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    nats = token_nats(held_out.hidden_states(model, batch, CPU), head_of(model), batch.targets)
    weights = torch.linspace(-1, 1, len(nats))  # each token by its own, so that none stands in for another
    gradients = torch.autograd.grad((weights * nats).sum(), [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    return nats.detach(), [g for g in gradients if g is not None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_shared_prompt_changes_no_log_probability_and_no_gradient(family: str, dtype: torch.dtype) -> None:
    data, model = rows(), model_of(family).to(dtype)
    assert packed_attention.takes_branches(model)
    bundles = bundles_of(data, GROUPS, 64)
    assert [bundle.rows for bundle in bundles] == [[0, 1, 2], [3], [4, 5]] and [bundle.tokens for bundle in bundles] == [22, 4, 25]
    order = [2, 0, 1]
    shared = bundles_batch(data, [bundles[place] for place in order], CPU.device)
    plain = make_batch(data, [row for place in order for row in bundles[place].rows], CPU.device)
    assert (shared.tokens, plain.tokens) == (51, 83) and shared.trained == plain.trained == int(data.trained.sum())
    assert torch.equal(shared.targets, plain.targets)
    (nats, gradients), (wanted, expected) = (nats_and_gradients(model, batch) for batch in (shared, plain))
    assert len(gradients) == len(expected) > 10 and float(wanted.std()) > 0.5, "attention has something to say"
    if dtype == torch.bfloat16:  # rounded differently
        assert float((nats - wanted).abs().mean()) < 0.1 * float(wanted.std())
        return
    torch.testing.assert_close(nats, wanted, atol=1e-4, rtol=1e-4)
    for one, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


def test_bundles_hold_no_more_than_they_may() -> None:
    data = rows()
    assert [bundle.rows for bundle in bundles_of(data, GROUPS, 15)] == [[0, 1], [2], [3], [4], [5]]
    assert [bundle.rows for bundle in bundles_of(data, GROUPS, 0)] == [[row] for row in range(6)]
    assert [bundle.prompt for bundle in bundles_of(data, GROUPS, 0)] == [9, 9, 9, 1, 14, 14]


def test_models_that_mix_tokens_otherwise_share_nothing() -> None:
    model = model_of("llama")
    model.config.layer_types = ["chunked_attention", "full_attention"]
    assert not packed_attention.takes_branches(model)
    model.config.layer_types = None
    model.set_attn_implementation("eager")
    assert not packed_attention.takes_branches(model)
