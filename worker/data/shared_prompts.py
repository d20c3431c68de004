"""Several answers to one prompt in one pack: the prompt is there once, and each of its answers attends to it and to itself.

    pack:       prompt 0 | prompt 1 | padding | answers to prompt 0 | answers to prompt 1
    positions:  each prompt from 0, each answer from the length of its prompt

Next to a pack of whole texts, the tokens of a prompt pass the model once instead of once for each answer, with the same result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from worker.data.batching import Batch, Tokenised, make_batch
from worker.modeling.packed_attention import Branches, filling
from worker.runtime.transfer import sent


class Bundle(NamedTuple):
    """Answers to one prompt that stay together, as rows of the data that have the prompt before them."""

    prompt: int  # tokens of the prompt
    rows: list[int]
    tokens: int  # of the prompt once and of all answers


def bundles_of(data: Tokenised, groups: Sequence[int], most: int) -> list[Bundle]:
    """The rows of each group in bundles of up to `most` tokens, where rows that follow each other are of one group; with 0 each row is a
    bundle of its own. A prompt ends before its row's first trained token."""
    found: list[Bundle] = []
    for row, group in enumerate(groups):
        length = data.lengths[row]
        prompt = int(np.argmax(data.trained[data.starts[row] : data.starts[row + 1]]))
        if found and groups[found[-1].rows[-1]] == group and found[-1].tokens + length - prompt <= most:
            last = found[-1]
            found[-1] = Bundle(prompt, [*last.rows, row], last.tokens + length - prompt)
        else:
            found.append(Bundle(prompt, [row], length))
    return found


def bundles_batch(data: Tokenised, bundles: Sequence[Bundle], device: torch.device) -> Batch:
    """The pack of some bundles, whose targets are those of their rows in their order; of single rows, the usual pack."""
    if all(len(bundle.rows) == 1 for bundle in bundles):
        return make_batch(data, [bundle.rows[0] for bundle in bundles], device)
    spans = [(place, slice(data.starts[row], data.starts[row + 1])) for place, bundle in enumerate(bundles) for row in bundle.rows]
    prompts = [bundle.prompt for bundle in bundles]
    tokens = sum(bundle.tokens for bundle in bundles)
    more = filling(tokens, device)
    front = sum(prompts) + sum(more)
    ends = np.cumsum(prompts)
    ids = [data.ids[data.starts[b.rows[0]] :][: b.prompt] for b in bundles] + [np.zeros(n, np.int32) for n in more]
    places = [np.arange(n) for n in (*prompts, *more)]
    sources, targets, lengths, at = [], [], [], front
    for place, span in spans:
        prompt = prompts[place]
        answer, learnt = data.ids[span][prompt:], np.flatnonzero(data.trained[span][prompt:])
        sources.append(np.where(learnt == 0, ends[place] - 1, at + learnt - 1))
        targets.append(answer[learnt])
        ids.append(answer)
        places.append(prompt + np.arange(len(answer)))
        lengths.append(len(answer))
        at += len(answer)
    flat, position, read, learn = (
        sent(torch.from_numpy(np.concatenate(parts).astype(np.int64)), device) for parts in (ids, places, sources, targets)
    )
    branches = branches_of(lengths, [len(bundle.rows) for bundle in bundles], device)
    arguments = {"sequence_lengths": [*prompts, *more], "branches": branches}
    return Batch(flat[None], position[None], read, learn, arguments=arguments, tokens=tokens, trained=len(learn))


def branches_of(lengths: Sequence[int], counts: Sequence[int], device: torch.device) -> Branches:
    """Of answers with these lengths, so many to each prompt."""
    longest = max(lengths)
    starts = np.cumsum([0, *lengths[:-1]])
    within = np.arange(longest)
    real = within < np.asarray(lengths)[:, None]  # (answers, longest)
    rows = np.where(real, starts[:, None] + within, 0)
    padded, kept = (sent(torch.from_numpy(x.astype(np.int64)), device) for x in (rows.ravel(), np.flatnonzero(real)))
    return Branches(list(counts), longest, padded, kept)
