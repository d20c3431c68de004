"""The real trainer where each pass without gradients takes `SECONDS`, as on a machine that is slow for its data."""

import sys
import time

import torch

from worker import evaluate, run, telling

SECONDS = 0.5
hidden_states = evaluate.hidden_states


def slowly(*given):
    if not torch.is_grad_enabled():
        time.sleep(SECONDS)
    return hidden_states(*given)


evaluate.hidden_states, telling.EVERY_SECONDS = slowly, 0.0
sys.exit(run.main(sys.argv[1:]))
