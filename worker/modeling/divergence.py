"""The divergence between the next-token distributions of two models at the same positions, without ever holding all logits."""

from __future__ import annotations

import math

import torch
from torch.utils.checkpoint import checkpoint

from worker.modeling.cross_entropy import Head, chunk_rows
from worker.modeling.token_logprobs import chunk_logits
from worker.runtime import devices


def divergence_of(student: torch.Tensor, teacher: torch.Tensor, kind: str) -> torch.Tensor:
    """The divergence at each position in nats, (K,), of log-probabilities (K, V).

    reverse_kl: Σ p_S (log p_S − log p_T); forward_kl: Σ p_T (log p_T − log p_S); jsd: the mean of both from the middle M = (p_S + p_T) / 2
    (Agarwal et al. 2023, https://arxiv.org/abs/2306.13649, section 2, with β 1, 0 and 0.5).
    """
    if kind == "reverse_kl":
        return (student.exp() * (student - teacher)).sum(1)
    if kind == "forward_kl":
        return (teacher.exp() * (teacher - student)).sum(1)
    middle = torch.logaddexp(student, teacher) - math.log(2)
    return 0.5 * (divergence_of(student, middle, "reverse_kl") + divergence_of(teacher, middle, "reverse_kl"))


def token_divergence(
    hidden: torch.Tensor, head: Head, teacher: torch.Tensor, teachers_head: Head, kind: str, compute: torch.dtype = torch.float32
) -> torch.Tensor:
    """The same, (K,), from the hidden states (K, H) and (K, H') before the heads; float32, or float64 where `compute` is.

    Gradients flow to `hidden` and the student's head. A head with more rows than the other, as padding of a vocabulary, is cut to it.
    """
    wide = torch.promote_types(compute, torch.float32)
    weight, teachers_weight = head.whole().to(compute), teachers_head.whole().to(compute)
    rows = chunk_rows(weight.shape[0], hidden.shape[0], devices.is_gpu(hidden.device), 24)
    shared = min(weight.shape[0], teachers_weight.shape[0])

    def part(states: torch.Tensor, weight: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        student = chunk_logits(states, weight, head, wide)[0][:, :shared].log_softmax(1)
        with torch.no_grad():
            known = chunk_logits(others, teachers_weight, teachers_head, wide)[0][:, :shared].log_softmax(1)
        return divergence_of(student, known, kind)

    found = []
    with torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, hidden.shape[0], rows):
            chunk = slice(start, start + rows)
            found.append(checkpoint(part, hidden[chunk], weight, teacher[chunk], use_reentrant=False))
    return torch.cat(found) if found else hidden.new_zeros(0, dtype=wide)
