"""The Triton kernel and the loss around it, in Triton's interpreter, which needs no GPU; where Triton is not installed, not at all."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

from app.settings import PROJECT

TRIALS = """
import types, torch
from worker.modeling import cross_entropy as loss
from worker.modeling.fused_layers.gpu.cross_entropy import softmax_gradient_

torch.manual_seed(0)
for vocabulary, rows, dtype, within in ((1000, 9, torch.float32, 1e-5), (8192, 3, torch.bfloat16, 8e-3), (9001, 5, torch.bfloat16, 8e-3)):
    logits = (torch.randn(rows, vocabulary) * 4).to(dtype)
    targets = torch.randint(0, vocabulary, (rows,))
    targets[1] = -100
    plain = logits.double().requires_grad_()
    wanted = torch.nn.functional.cross_entropy(plain, targets, reduction="none", ignore_index=-100)
    wanted.sum().backward()
    losses = torch.full((rows,), float("nan"))
    softmax_gradient_(logits, targets, losses)
    print(vocabulary, float((losses - wanted).abs().max()) < 1e-4, float((logits - plain.grad).abs().max()) < within)

hidden, weight = torch.randn(700, 32), torch.randn(500, 32)
targets = torch.randint(0, 500, (700,))
targets[-44:] = -100
state = hidden.clone().requires_grad_()
wanted = loss.linear_cross_entropy(state, loss.Head(weight, None), targets)
wanted.backward()
loss.CHUNK_BYTES_GPU = 4 * 500 * 300  # three chunks
kept = types.SimpleNamespace(needs_input_grad=(True, False), save_for_backward=lambda *saved: setattr(kept, "saved", saved))
total = loss._on_gpu(kept, hidden, weight, targets, torch.bfloat16)
apart = torch.nn.functional.cosine_similarity(kept.saved[0].flatten(), state.grad.flatten(), 0)
print("loss", abs(float(total - wanted) / float(wanted)) < 2e-3, float(apart) > 0.9995)
"""


def test_the_kernel_and_the_loss_around_it() -> None:
    if find_spec("triton") is None:
        pytest.skip("Triton is not installed; torch's builds for CUDA bring it")
    given = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", TRIALS], cwd=PROJECT, env=given, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    told = done.stdout.splitlines()
    assert [line.split()[0] for line in told] == ["1000", "8192", "9001", "loss"] and "False" not in done.stdout, done.stdout
