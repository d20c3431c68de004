"""The Triton kernel of the loss, and the loss around it, in Triton's own interpreter on the CPU, against plain torch."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

from app.settings import PROJECT

FOLDER = PROJECT / ".triton"
"""Where `make test` puts Triton, which torch's builds for the CPU come without: were it among the installed packages, torch would use it."""
KERNEL = """
import torch
from worker.kernels.gpu.cross_entropy import softmax_gradient_

torch.manual_seed(0)
for dtype, within in ((torch.float32, 1e-5), (torch.bfloat16, 4e-3), (torch.float16, 4e-3)):
    for vocabulary in (64, 1000, 8192, 10_000):
        logits = (torch.randn(7, vocabulary) * 3).to(dtype)
        targets = torch.randint(0, vocabulary, (7,))
        targets[::3] = -100
        plain = logits.float().requires_grad_()
        wanted = torch.nn.functional.cross_entropy(plain, targets, reduction="none", ignore_index=-100)
        wanted.sum().backward()
        losses = torch.empty(7)
        softmax_gradient_(logits, targets, losses)
        torch.testing.assert_close(losses, wanted.detach(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(logits.float(), plain.grad, rtol=0, atol=within)
"""
LOSS = """
import types, torch
from worker.modeling import cross_entropy as loss

torch.manual_seed(0)
hidden, weight = torch.randn(700, 32), torch.randn(500, 32)
targets = torch.randint(0, 500, (700,))
targets[-44:] = -100
state = hidden.clone().requires_grad_()
wanted = loss.linear_cross_entropy(state, loss.Head(weight, None), targets)
wanted.backward()
loss.chunk_rows = lambda *asked: 256  # three chunks
kept = types.SimpleNamespace(needs_input_grad=(True, False, False, False), save_for_backward=lambda *saved: setattr(kept, "saved", saved))
total = loss._on_gpu(kept, hidden, weight, None, targets, torch.bfloat16, None)
gradient = next(x for x in kept.saved if x is not None and x.shape == hidden.shape)
apart = torch.nn.functional.cosine_similarity(gradient.flatten().float(), state.grad.flatten(), 0)
assert abs(float(total.detach() - wanted.detach()) / float(wanted.detach())) < 2e-3 and float(apart) > 0.9995, (total, wanted, apart)
"""


@pytest.mark.skipif(
    find_spec("triton") is None and not FOLDER.is_dir(),
    reason="Triton is not installed: make test does it, on processors that it has wheels for",
)
@pytest.mark.parametrize("program", [KERNEL, LOSS], ids=["the kernel", "the loss around it"])
def test_the_kernel_gives_the_loss_and_its_gradient(program: str) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(FOLDER) if FOLDER.is_dir() else ""}
    done = subprocess.run([sys.executable, "-c", program], cwd=PROJECT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
