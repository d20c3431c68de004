"""The load-balancing loss of mixtures of experts is transformers' own, and is there where routers train."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from app import events
from app.run_settings import RunSettings
from app.shapes import STRUCTURE
from app.spec import ModelRef
from app.strategies import STRATEGIES
from benchmarks.architectures import small_model, write_small
from tests.worker.orders import chat_rows, order, put_dataset
from tests.worker.training.test_settings import in_two, of, run, same
from worker.conversion import trial
from worker.data.batching import Tokenised, make_batch
from worker.modeling import packed_attention
from worker.modeling.router_loss import router_loss_of
from worker.runtime.device import choose
from worker.training.objectives.causal_lm import CausalLM

KINDS = ["mixtral", "qwen3_moe", "olmoe"]
ENGINE = choose(RunSettings(precision="fp32"), STRATEGIES["full"]())


def trained(kind: str) -> torch.nn.Module:
    """A small model whose every weight trains, and whose routers prefer some experts."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = small_model(kind, torch.float32)
    for name, weight in model.named_parameters():
        if "gate.weight" in name or "router.weight" in name:
            weight.data *= 20
    return model.train()


def rows(*lengths: int) -> Tokenised:
    draw = np.random.default_rng(0)
    ids = draw.integers(3, 60, sum(lengths)).astype(np.int32)
    starts = np.cumsum([0, *lengths])
    learned = np.ones(len(ids), bool)
    learned[starts[:-1]] = False
    return Tokenised(ids, learned, starts, list(range(len(lengths))), 0, [])


def ours(model: torch.nn.Module, data: Tokenised, pack: list[int], *, padded: bool = False) -> torch.Tensor:
    found = router_loss_of(model)
    assert found is not None and found.coefficient > 0
    model.set_attn_implementation(packed_attention.NAME)
    batch = make_batch(data, pack, ENGINE.device, padded=padded, mark=True)
    output = CausalLM.loss(SimpleNamespace(router_loss=found), model, batch, ENGINE)
    return output.loss / output.losses


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_has_transformers_loss_and_gradients(kind: str) -> None:
    """45 tokens, which a pack pads to 64: padding is not routed."""
    model, data = trained(kind), rows(45)
    ids = torch.from_numpy(data.ids[None].astype(np.int64))
    model.set_attn_implementation("eager")
    expected = model(input_ids=ids, labels=ids, output_router_logits=True)
    assert float(expected.aux_loss.detach()) > 1.01 * model.num_experts_per_tok, "these routers are not balanced"
    expected.loss.backward()
    gradients = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()
    found = ours(model, data, [0])
    found.backward()
    with torch.no_grad():
        without = model(input_ids=ids, labels=ids, output_router_logits=False).loss
    assert found.item() == pytest.approx(expected.loss.item(), rel=1e-5)
    assert found.item() != pytest.approx(without.item(), rel=1e-5)
    for name, weight in model.named_parameters():
        assert torch.allclose(weight.grad, gradients[name], rtol=1e-3, atol=1e-5), name


def test_padding_between_rows_is_not_routed_either() -> None:
    model, data = trained("mixtral"), rows(20, 45, 31)
    assert ours(model, data, [0, 1, 2], padded=True).item() == pytest.approx(ours(model, data, [0, 1, 2]).item(), rel=1e-5)


def test_no_loss_where_no_router_trains() -> None:
    model = trained("mixtral")
    for name, weight in model.named_parameters():
        weight.requires_grad_("gate" not in name)
    assert router_loss_of(model) is None
    plain = small_model("phi3", torch.float32)
    assert router_loss_of(plain) is None
    frozen = trained("qwen3_moe")
    frozen.router_aux_loss_coef = 0.0
    assert router_loss_of(frozen) is None


@pytest.mark.long
def test_a_job_balances_its_experts_and_resumes_bit_for_bit(data_dir: Path) -> None:
    folder = data_dir / "models" / "experts"
    write_small("mixtral", folder)
    config = json.loads((folder / "config.json").read_text())
    shape = trial.read_shape(config)
    (folder / "config.json").write_text(json.dumps({**config, STRUCTURE: shape.model_dump(mode="json")}))
    model = ModelRef(id=put_dataset(chat_rows()).id, name="experts", kind="dialogue", path="models/experts", revision="1" * 64, shape=shape)
    full, lora = (order(model, put_dataset(chat_rows()), name, max_steps=6, epochs=9, learning_rate=1e-3) for name in ("full", "lora"))
    whole = run(full, data_dir)
    coefficient = config["router_aux_loss_coef"]
    assert of(whole, events.Started)[0].details["router_loss"] == coefficient > 0
    same(in_two(full, data_dir, 3), whole)
    assert "router_loss" not in of(run(lora, data_dir, "lora"), events.Started)[0].details, "LoRA leaves routers as they are"
