"""Are losses and gradients of reinforcement, reward models and on-policy distillation those of TRL? The same numbers through TRL's
own `GRPOTrainer._compute_loss`, `RewardTrainer.compute_loss` and `GKDTrainer.generalized_jsd_loss`, in float64.

    PYTHONPATH=FOLDER python -m benchmarks.trl_losses

FOLDER has TRL and what it imports: `pip install --no-deps --target FOLDER trl datasets pandas multiprocess dill xxhash pytz python-dateutil six`.
Leaves with 1 where an advantage, a loss or a gradient differs by more than 1e-5.
"""

from __future__ import annotations

import copy
import sys
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from app.objectives.reinforcement import ReinforcementSettings
from worker.data.batching import Tokenised
from worker.data.shared_prompts import bundles_batch, bundles_of
from worker.modeling import packed_attention
from worker.modeling.cross_entropy import head_of
from worker.modeling.divergence import divergence_of
from worker.modeling.token_logprobs import token_nats
from worker.runtime.device import Compute
from worker.scoring.held_out import hidden_states
from worker.training.objectives import reward
from worker.training.objectives.reinforcement import policy_losses
from worker.training.rollouts import advantages

COUNTS, LIMIT, GROUP = [3, 1, 5, 2, 6, 4, 2, 5], 9, 4
REWARDS = [1.0, 0.0, 0.5, 0.25, 0.0, 0.0, 1.0, 0.3]
TOLERANCE = 1e-5
UPDATES = 4


def main() -> int:
    import trl
    from trl.trainer.grpo_trainer import GRPOTrainer

    print(f"TRL {trl.__version__}")
    draw = torch.Generator().manual_seed(0)
    rows, longest = len(COUNTS), max(COUNTS)
    mask = (torch.arange(longest) < torch.tensor(COUNTS)[:, None]).double()
    now = -torch.rand(rows, longest, generator=draw, dtype=torch.float64)
    old, base = (now + 0.3 * torch.randn(rows, longest, generator=draw, dtype=torch.float64) for _ in range(2))
    worst = 0.0
    for variant in ("grpo", "dr_grpo", "dapo", "gspo"):
        for kl in (0.0, 0.2):
            own = ReinforcementSettings(variant=variant, kl=kl, answer_tokens=LIMIT)
            grouped = torch.tensor(REWARDS, dtype=torch.float64).view(-1, GROUP)
            theirs = grouped - grouped.mean(1, keepdim=True)
            theirs = (theirs / (grouped.std(1, keepdim=True) + 1e-4) if own.loss.scaled else theirs).reshape(-1)
            ours = torch.tensor([a for group in grouped.tolist() for a in advantages(group, own.loss)], dtype=torch.float64)
            new = now.clone().requires_grad_()
            ids = torch.zeros(rows, longest, dtype=torch.long)
            given = {
                "prompt_ids": ids[:, :1], "prompt_mask": torch.ones(rows, 1), "completion_ids": ids, "completion_mask": mask, "advantages": theirs,
                "old_per_token_logps": old, "ref_per_token_logps": base, "num_items_in_batch": mask.sum(),
            }  # fmt: skip
            loss = GRPOTrainer._compute_loss(_trainer(own, variant, new), None, given)
            (gradient,) = torch.autograd.grad(loss, new)
            flat = _flat(now).requires_grad_()
            mean = sum(COUNTS) / rows
            limit = float(LIMIT) if own.loss.average == "limit" else mean
            found = policy_losses(flat, _flat(old), ours, COUNTS, own.loss, limit, _flat(base) if kl else None, kl).losses.mean()
            (own_gradient,) = torch.autograd.grad(found, flat)
            apart = [float(x.detach().abs().max()) for x in (theirs - ours, loss - found, _flat(gradient) - own_gradient)]
            worst = max(worst, *apart)
            print(f"{variant:8} kl {kl:g}  advantages {apart[0]:.1e}  loss {apart[1]:.1e}  gradient {apart[2]:.1e}")
    for variant in ("grpo", "dr_grpo", "dapo", "gspo"):
        apart = _of_updates(variant)
        worst = max(worst, *apart)
        print(f"{variant:8} {UPDATES} updates of a model on one batch  losses {apart[0]:.1e}  weights {apart[1]:.1e}")
    for centering in (0.0, 0.01, 0.5):
        apart = _of_rewards(centering)
        worst = max(worst, *apart)
        print(f"reward   centering {centering:g}  loss {apart[0]:.1e}  gradient {apart[1]:.1e}")
    for kind in ("reverse_kl", "forward_kl", "jsd"):
        apart = _of_distillation(kind)
        worst = max(worst, *apart)
        print(f"{kind:10}  loss {apart[0]:.1e}  gradient {apart[1]:.1e}")
    return int(worst > TOLERANCE)


def _of_updates(variant: str) -> tuple[float, float]:
    """How far the losses of several updates on the same answers are from those with TRL's `num_iterations`, and the weights after them: a small
    Llama, its answers packed behind prompts that they share, next to padded rows; the old log-probabilities are those of the first weights."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    own = ReinforcementSettings(variant=variant, answer_tokens=LIMIT, updates_per_batch=UPDATES, clip_low=0.05, clip_high=0.05)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8
    )
    ours: Any = AutoModelForCausalLM.from_config(config, attn_implementation=packed_attention.NAME).double()
    theirs: Any = AutoModelForCausalLM.from_config(
        copy.deepcopy(config), attn_implementation="eager"
    ).double()  # a config names one attention
    theirs.load_state_dict(ours.state_dict())
    rows, longest, prompt = len(COUNTS), max(COUNTS), 6
    ids = torch.randint(0, 40, (rows, prompt + longest), generator=torch.Generator().manual_seed(3))
    ids[:, :prompt] = ids[::GROUP, :prompt].repeat_interleave(GROUP, 0)
    mask = (torch.arange(longest) < torch.tensor(COUNTS)[:, None]).double()
    kept = [row[: prompt + count].numpy().astype(np.int32) for row, count in zip(ids, COUNTS, strict=True)]
    trained = np.concatenate([np.arange(len(row)) >= prompt for row in kept])
    data = Tokenised(np.concatenate(kept), trained, np.cumsum([0, *map(len, kept)]).astype(np.int64), list(range(rows)), 0, [])
    bundles = bundles_of(data, [row // GROUP for row in range(rows)], 1000)
    engine = Compute(torch.device("cpu"), "cpu", "fp32", torch.float64, 1)
    batch = bundles_batch(data, bundles, engine.device)
    limit = float(LIMIT) if own.loss.average == "limit" else sum(COUNTS) / rows
    found = torch.tensor([a for at in range(0, rows, GROUP) for a in advantages(REWARDS[at : at + GROUP], own.loss)], dtype=torch.float64)

    def now() -> torch.Tensor:
        return -token_nats(hidden_states(ours, batch, engine), head_of(ours), batch.targets, torch.float64)

    def padded() -> torch.Tensor:
        attention = torch.cat([torch.ones(rows, prompt), mask], 1)
        logs = theirs(input_ids=ids, attention_mask=attention).logits[:, prompt - 1 : -1].log_softmax(-1)
        return logs.gather(2, ids[:, prompt:, None])[..., 0]

    old, old_padded, losses = now().detach(), padded().detach(), [0.0]
    given = {
        "prompt_ids": ids[:, :prompt], "prompt_mask": torch.ones(rows, prompt), "completion_ids": ids[:, prompt:], "completion_mask": mask,
        "advantages": found, "old_per_token_logps": old_padded, "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    for _ in range(UPDATES):
        loss = policy_losses(now(), old, found, COUNTS, own.loss, limit).losses.mean()
        expected = GRPOTrainer._compute_loss(_trainer(own, variant, padded()), None, given)
        losses.append(float((loss - expected).detach().abs()))
        for model, one in ((ours, loss), (theirs, expected)):
            for parameter, gradient in zip(model.parameters(), torch.autograd.grad(one, list(model.parameters())), strict=True):
                parameter.data -= 0.5 * gradient
    moved = [float((p - q).abs().max()) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True)]
    return max(losses), max(moved)


def _of_distillation(kind: str) -> tuple[float, float]:
    """How far the divergence of 32 positions and its gradient are from TRL's generalized Jensen–Shannon divergence."""
    from trl.experimental.gkd.gkd_trainer import GKDTrainer

    draw = torch.Generator().manual_seed(2)
    student, teacher = (2 * torch.randn(32, 50, dtype=torch.float64, generator=draw) for _ in range(2))
    ours, theirs = (student.clone().requires_grad_() for _ in range(2))
    beta = {"reverse_kl": 1, "forward_kl": 0, "jsd": 0.5}[kind]
    loss = GKDTrainer.generalized_jsd_loss(theirs[None], teacher[None], labels=torch.zeros(1, 32, dtype=torch.long), beta=beta)
    found = divergence_of(ours.log_softmax(1), teacher.log_softmax(1), kind).mean()
    gradients = [torch.autograd.grad(one, given)[0] for one, given in ((loss, theirs), (found, ours))]
    return float((loss - found).detach().abs()), float((gradients[0] - gradients[1]).abs().max())


def _of_rewards(centering: float) -> tuple[float, float]:
    """How far loss and gradient of 16 pairs are from TRL's."""
    from trl.trainer.reward_trainer import RewardTrainer

    pairs = 3 * torch.randn(16, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ours, theirs = (pairs.clone().requires_grad_() for _ in range(2))
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True), args=SimpleNamespace(center_rewards_coefficient=centering or None),
        accelerator=SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x),
        _total_train_tokens=0, _tp_size=1, _metrics={"train": defaultdict(list)},
    )  # fmt: skip
    logits = theirs.T.reshape(-1, 1)  # the chosen answers, and behind them the rejected ones
    loss = RewardTrainer.compute_loss(trainer, lambda **_: SimpleNamespace(logits=logits), {"attention_mask": torch.ones(32, 4)})
    found = reward.losses_of(ours, centering).mean()
    gradients = [torch.autograd.grad(one, given)[0] for one, given in ((loss, theirs), (found, ours))]
    return float((loss - found).detach().abs()), float((gradients[0] - gradients[1]).abs().max())


def _flat(rows: torch.Tensor) -> torch.Tensor:
    return torch.cat([row[:count] for row, count in zip(rows, COUNTS, strict=True)])


def _trainer(own: ReinforcementSettings, variant: str, new: torch.Tensor) -> Any:
    """What the method reads of its trainer."""
    low, high = own.loss.clip
    return SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (new, torch.zeros_like(new), None),
        importance_sampling_level="sequence" if variant == "gspo" else "token",
        loss_type="grpo" if variant == "gspo" else variant,
        beta=own.kl, epsilon_low=low, epsilon_high=high, max_completion_length=LIMIT,
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        accelerator=SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, **_: x, gather_for_metrics=lambda x: x),
        model=SimpleNamespace(training=True), current_gradient_accumulation_steps=1, _metrics={"train": defaultdict(list)},
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None, use_vllm=False,
        vllm_importance_sampling_correction=False, log_completions=False, _entropy_bonus_enabled=False,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
