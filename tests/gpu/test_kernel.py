"""The Triton kernel of the loss, in Triton's own interpreter on the CPU, against plain torch."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

from app.settings import PROJECT

PROGRAM = """
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


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed: torch's builds for the CPU come without it")
def test_the_kernel_gives_the_loss_and_its_gradient() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=PROJECT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
