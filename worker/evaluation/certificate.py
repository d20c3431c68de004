"""The certificate of a model: what was tried on it when it was added, with its values and their bounds.

    python -m worker.evaluation.certificate FOLDER ANSWER       in a child with limits; the answer is a file of JSON
    certify(folder, shape)      {"tier", "checks", "strategies", "versions", "made_at"}

Tier A is an architecture with formulas (`app.shapes.FORMULAS`), whose strategies tests compare with the model; of one in tier B, whose
shape was read from the model, each strategy is tried. Tier C is the same with padded batches, because packs gave other logits.

The model itself is loaded where its weights fit into memory twice; of a larger one nothing is tried, and the certificate says so.
Texts are random token ids from a fixed seed. Values are the largest difference of a logit from those of transformers' own forward
pass over the text alone, as a share of the largest logit; of an encoder, which has no logits, the largest difference of a state. Its
strategies train a classifier on the mean of the states.
"""

from __future__ import annotations

import copy
import json
import math
import os
import resource
import sys
import tempfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
import torch.nn.functional as F
from transformers import __version__ as transformers_version

from app.errors import Unsupported
from app.planning.memory import layer_bytes
from app.shapes import MeasuredStep, Shape, shape_of
from app.strategies import STRATEGIES, Strategy
from app.strategies._model import decoder
from app.strategies.prompt_tuning import PromptTuning
from worker.conversion.convert import write_answer
from worker.evaluation import step_cost
from worker.modeling import new_tokens, padded
from worker.modeling import packed_attention as packed
from worker.modeling.auto import maker_of
from worker.modeling.classifier import pool, without_pooler
from worker.modeling.cross_entropy import head_of, linear_cross_entropy
from worker.modeling.kv_cache import ATTENTION, Cache, ForwardPass, Segment, running

LENGTHS = (7, 19, 12)
BOUND, LOSS_BOUND, STRATEGY_BOUND = 1e-3, 1e-4, 1e-3
MAX_STRATEGY_PARAMETERS = 400_000_000
"""Of a larger model only `FIRST` is tried: each strategy needs another copy of the weights."""
HEAD_ONLY = PromptTuning()
"""A strategy whose layers keep nothing of their own."""
FIRST = "lora"
_SEED = 20


class CertificateCheck(NamedTuple):
    """One thing that was tried. `value` is at most `bound` where it passed; both are None where nothing was measured."""

    name: str
    passed: bool
    value: float | None
    bound: float | None
    message: str


def main(arguments: list[str]) -> None:
    folder, answer = Path(arguments[0]), Path(arguments[1])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    def work() -> dict[str, Any]:
        config = json.loads((folder / "config.json").read_text())
        return certify(folder, shape_of(config))

    write_answer(answer, work)


def certify(folder: Path, shape: Shape) -> dict[str, Any]:
    """Raises Unsupported where rows cannot be packed, since a model is trained and answers in packs only."""
    needed = 2 * 4 * shape.parameters()
    free = psutil.virtual_memory().available
    if needed > 0.8 * free:
        why = f"Its weights need {needed / 1e9:.1f} GB in float32, twice, and {free / 1e9:.1f} GB are free."
        return _certificate(shape, [CertificateCheck("weights", True, None, None, f"Nothing was tried: {why}")], True, {})
    model, checks = _load(folder, shape)
    texts = _texts(shape, padded.edge_of(model) if padded.encodes(model) else None)
    with torch.no_grad():
        alone = [_read(model, input_ids=text[None]) for text in texts]
    scale = float(max(logits.abs().max() for logits in alone)) or 1.0
    packs, cached = False, None
    if not padded.encodes(model):
        checks.append(_packed(model, texts, alone, scale))
        packs = checks[-1].passed
    if packs and not _is_encoder(model):  # one whose attention is not asked for by name may read packs, and not the engine's cache
        cached = _cached(model, texts[1], alone[1], scale, shape)
        packs = cached.passed
        model.set_attn_implementation(packed.NAME)
    if not packs:
        model = _load(folder, shape)[0]
        padded.pad_packs(model)
        checks.append(_padded(model, texts, alone, scale))
        if shape.structure is None or not checks[-1].passed:
            raise Unsupported(
                f"This {shape.model_type} cannot be trained: {checks[-1].message}.",
                hint="Choose another model, such as a Llama, Qwen, Gemma or BERT.",
                param="path",
            )
    if not _is_encoder(model):
        checks.append(_loss(model, texts, alone))
    checks += [cached] if cached else []
    if shape.structure is None:
        return _certificate(shape, checks, packs, {})
    cost = step_cost.measure(model, shape, lambda reader, text: _states(reader, [_with_edge(reader, text)]))
    checks.append(CertificateCheck("step", True, None, None, _told(cost, shape)))
    if not _is_encoder(model):
        checks.append(_learned_rows(model, texts))
    return _certificate(shape, checks, packs, dict(_strategies(model, texts, shape, scale)), cost)


def _told(cost: MeasuredStep, shape: Shape) -> str:
    by_formula, _ = layer_bytes(shape, HEAD_ONLY, half=False, cuda=False)
    return (
        f"a step keeps {cost.bytes_per_token / shape.layers / 1e3:.3g} kB per token and layer in float32, where the formula says "
        f"{by_formula / 1e3:.3g}, and {cost.bytes_per_pair / shape.layers:.3g} bytes per pair of tokens"
    )


def _certificate(
    shape: Shape, checks: list[CertificateCheck], packs: bool, strategies: dict[str, dict[str, Any]], cost: MeasuredStep | None = None
) -> dict[str, Any]:
    return {
        **({"step": cost.model_dump()} if cost else {}),
        "tier": "A" if shape.structure is None else "B" if packs else "C",
        "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "checks": [check._asdict() for check in checks],
        "strategies": strategies,
        "versions": {"torch": torch.__version__, "transformers": transformers_version},
    }


def _load(folder: Path, shape: Shape) -> tuple[Any, list[CertificateCheck]]:
    loaded: Any = maker_of(shape).from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, use_safetensors=True, trust_remote_code=False, output_loading_info=True
    )
    model, told = loaded
    without_pooler(model)
    lacking = sorted([*told["missing_keys"], *(name for name, *_ in told.get("mismatched_keys") or [])])
    lacking = [name for name in lacking if not (shape.architecture == "encoder" and name.startswith("pooler."))]
    if lacking:
        raise Unsupported(
            f"The weights lack {len(lacking)} of the model's tensors, or hold them in another size, the first {lacking[0][:80]}.",
            hint="Copy the whole model.",
            param="path",
        )
    for name, weight in model.named_parameters():
        if not torch.isfinite(weight).all():
            raise Unsupported(f"The weights hold a value that is not a number, in {name[:80]}.", hint="Copy the model again.", param="path")
    return model.eval(), [CertificateCheck("weights", True, 0.0, 0.0, "every tensor of the model is in the files, in its size, and finite")]


def _texts(shape: Shape, edge: padded.Edge | None = None) -> list[torch.Tensor]:
    """Random texts; with an `edge` each is a prompt and an answer."""
    draw = torch.Generator().manual_seed(_SEED)
    high = max(2, shape.vocabulary - 1)
    found = [torch.randint(min(4, high - 1), high, (min(n, shape.positions // 4),), generator=draw) for n in LENGTHS]
    return found if edge is None else [_with(edge, text) for text in found]


def _with(edge: padded.Edge, text: torch.Tensor) -> torch.Tensor:
    """A text whose second half is an answer."""
    half = max(1, len(text) // 2)
    return torch.cat([text[: half - 1], torch.tensor(edge), text[half + 1 :]])


def _with_edge(model: Any, text: torch.Tensor) -> torch.Tensor:
    return _with(padded.edge_of(model), text) if padded.encodes(model) and len(text) > 1 else text


def _apart(found: torch.Tensor, expected: torch.Tensor, scale: float) -> float:
    apart = float((found - expected).abs().max()) / scale
    return apart if math.isfinite(apart) else 1e9


def _check(name: str, bound: float, message: str, measure: Callable[[], float]) -> CertificateCheck:
    """A check whose failure is a value above its bound, or an error, in words."""
    try:
        value = measure()
    except Exception as error:
        return CertificateCheck(name, False, None, bound, f"{type(error).__name__}: {str(error)[:200]}")
    passed = value <= bound
    return CertificateCheck(
        name, passed, value, bound, message if passed else f"{message}: they differ by {value:.2g}, more than {bound:g}"
    )


def _pack(model: torch.nn.Module, texts: list[torch.Tensor]) -> dict[str, Any]:
    device = next(model.parameters()).device
    return packed.packed(torch.cat(texts).numpy(), [len(text) for text in texts], device)


def _packed(model: Any, texts: list[torch.Tensor], alone: list[torch.Tensor], scale: float) -> CertificateCheck:
    def measure() -> float:
        model.set_attn_implementation(packed.NAME)
        packed.count_from_padding(model)
        return _apart(_outputs(model, texts)[: sum(map(len, texts))], torch.cat(alone), scale)

    return _check("packed", BOUND, f"a pack of texts gives the {_what(model)} of the texts alone", measure)


def _padded(model: Any, texts: list[torch.Tensor], alone: list[torch.Tensor], scale: float) -> CertificateCheck:
    def measure() -> float:
        apart = _apart(_outputs(model, texts)[: sum(map(len, texts))], torch.cat(alone), scale)
        if _is_encoder(model):
            return apart
        with torch.no_grad():
            whole = torch.cat(padded.whole_texts(model, [text.tolist() for text in texts]))
        return max(apart, _apart(whole, torch.cat(alone), scale))

    return _check("padded", BOUND, f"a padded batch of texts gives the {_what(model)} of the texts alone", measure)


def _is_encoder(model: Any) -> bool:
    return model.get_output_embeddings() is None


def _what(model: Any) -> str:
    return "states" if _is_encoder(model) else "logits"


def _read(model: Any, **arguments: Any) -> torch.Tensor:
    """Logits (T, V), or of an encoder its states (T, H)."""
    if _is_encoder(model):
        return model(**arguments).last_hidden_state[0]
    if padded.encodes(model):
        return _read_answers(model, **arguments)
    return model(**arguments, use_cache=False).logits[0]


def _read_answers(model: Any, input_ids: torch.Tensor, **arguments: Any) -> torch.Tensor:
    """Logits of an encoder–decoder: of a pack as the trainer reads it, or of one text by transformers' own call."""
    if arguments:
        states = decoder(model)(input_ids=input_ids, use_cache=False, **arguments).last_hidden_state[0]
        head = head_of(model)
        logits = F.linear(states, head.weight) * head.scale + (0 if head.bias is None else head.bias)
        return logits * states.any(-1, keepdim=True)  # none for the prompt
    start = padded.answer_start(input_ids[0].tolist(), padded.edge_of(model))
    answer = model(input_ids=input_ids[:, :start], decoder_input_ids=input_ids[:, start:], use_cache=False).logits[0]
    return torch.cat([answer.new_zeros(start, answer.shape[-1]), answer])


def _first(model: Any, text: torch.Tensor) -> int:
    """The first position of a text whose next token has a loss."""
    return padded.answer_start(text.tolist(), padded.edge_of(model)) if padded.encodes(model) else 0


def _states(model: Any, texts: list[torch.Tensor]) -> torch.Tensor:
    """The states (T, H) of a pack, as the trainer reads it."""
    return _read(model, **_pack(model, texts)) if _is_encoder(model) else _hidden(model, texts)


def _hidden(model: Any, texts: list[torch.Tensor]) -> torch.Tensor:
    return decoder(model)(**_pack(model, texts), use_cache=False).last_hidden_state[0]


def _mean_loss(model: Any, texts: list[torch.Tensor]) -> torch.Tensor:
    """Mean loss of the next token over a pack, by the trainer's own head; of an encoder, the loss of telling the texts apart by the mean
    of their states."""
    if _is_encoder(model):
        vectors = pool(_states(model, texts), [len(text) for text in texts], "mean")
        head = torch.randn(vectors.shape[1], len(texts), generator=torch.Generator().manual_seed(_SEED))
        return F.cross_entropy(vectors @ head, torch.arange(len(texts)))
    whole = torch.cat(texts)
    ends = torch.tensor([len(text) for text in texts]).cumsum(0) - 1
    starts = [0, *(ends[:-1] + 1).tolist()]
    sources = torch.cat(
        [torch.arange(start + _first(model, text), end) for start, end, text in zip(starts, ends.tolist(), texts, strict=True)]
    )
    hidden = _hidden(model, texts).index_select(0, sources)
    return linear_cross_entropy(hidden, head_of(model), whole[sources + 1], torch.float32) / len(sources)


def _loss(model: Any, texts: list[torch.Tensor], alone: list[torch.Tensor]) -> CertificateCheck:
    def measure() -> float:
        first = [_first(model, text) for text in texts]
        rows = list(zip(texts, alone, first, strict=True))
        own = [F.cross_entropy(logits[at:-1].float(), text[at + 1 :], reduction="sum") for text, logits, at in rows]
        count = sum(len(text) - 1 - at for text, _, at in rows)
        with torch.no_grad():
            return abs(float(_mean_loss(model, texts)) - float(sum(own)) / count)

    return _check("loss", LOSS_BOUND, "the loss is that of the model's own logits", measure)


def _learned_rows(model: Any, texts: list[torch.Tensor]) -> CertificateCheck:
    """The rows of new tokens beside frozen tables have the loss and the gradient that they have in tables that learn."""

    def measure() -> float:
        copied = copy.deepcopy(model).requires_grad_(False)
        added = new_tokens.AddedTokens(copied.get_input_embeddings().num_embeddings, [[4, 5], [6, 7, 8]])
        new_tokens.widen(copied, added)
        given = [torch.cat([added.ids, text, added.ids]) for text in texts]  # in the prompt and in the answer, where there are two sides
        with torch.no_grad():
            _read(copied, input_ids=given[0][None])  # the model's own call reads them too
        tables = {id(layer.weight): layer.weight for layer in (copied.get_input_embeddings(), copied.get_output_embeddings())}
        for table in tables.values():
            table.requires_grad_(True)
        whole = _mean_loss(copied, given)
        whole.backward()
        wanted = [_gradient(table)[added.ids] for table in tables.values()]
        for table in tables.values():
            table.requires_grad_(False)
            table.grad = None
        learned = new_tokens.learn(copied)
        loss = _mean_loss(copied, given)
        loss.backward()
        found = {id(one.rows): _gradient(one.rows) for one in learned}.values()
        apart = [_apart(ours, theirs, float(theirs.abs().max()) or 1.0) for ours, theirs in zip(found, wanted, strict=True)]
        return max(abs(float(loss.detach() - whole.detach())), *apart)

    return _check("new_tokens", BOUND, "rows of new tokens are trained as in tables that are trained", measure)


def _gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    assert parameter.grad is not None, "it has passed backward"
    return parameter.grad


def _cached(model: Any, text: torch.Tensor, alone: torch.Tensor, scale: float, shape: Shape) -> CertificateCheck:
    """The engine's cache: all but the last three tokens as a prompt, then one at a time."""

    def measure() -> float:
        model.set_attn_implementation(ATTENTION)
        cache = Cache(min(shape.positions, 256), 1)
        cache.grow(size := cache.size_for(len(text)), 1)
        slot, device = cache.blocks[size].slots[0], torch.device("cpu")
        prompt = len(text) - 3
        steps = [ForwardPass([], [Segment(slot, 0, prompt, 0)], device)]
        steps += [ForwardPass([Segment(slot, 0, 1, past)], [], device) for past in range(prompt, len(text))]
        worst, past = 0.0, 0
        for step, count in zip(steps, [prompt, 1, 1, 1], strict=True):
            ids = text[past : past + count]
            with torch.no_grad(), running(step):
                logits = model(input_ids=ids[None], position_ids=torch.arange(past, past + count)[None], use_cache=False).logits[0]
            worst = max(worst, _apart(logits, alone[past : past + count], scale))
            past += count
        return worst

    return _check("cached", BOUND, "an answer token by token has the logits of the whole text", measure)


def _strategies(model: Any, texts: list[torch.Tensor], shape: Shape, scale: float) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each strategy that trains such a model by gradients: attached, one step, saved, and loaded onto the base again."""
    base, task = _outputs(model, texts), "classification" if shape.architecture == "encoder" else "generation"
    for name, kind in STRATEGIES.items():
        strategy = kind()
        if kind.recipe != "gradient" or kind.base_bits is not None or strategy.unavailable(shape, task=task, cuda=False):
            continue
        if shape.parameters() > MAX_STRATEGY_PARAMETERS and name != FIRST:
            continue
        try:
            yield name, {"works": True, **_tried(strategy, task, model, texts, shape, base, scale)}
        except Exception as error:
            yield name, {"works": False, "message": f"{type(error).__name__}: {str(error)[:300]}"}


def _tried(
    strategy: Strategy, task: str, base_model: Any, texts: list[torch.Tensor], shape: Shape, base: torch.Tensor, scale: float
) -> dict[str, Any]:
    torch.manual_seed(_SEED)
    lead = torch.zeros(strategy.virtual_tokens(), dtype=torch.long)
    texts = [torch.cat([lead, text]) for text in texts]
    model: Any = strategy.attach(copy.deepcopy(base_model), task=task).train()
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    if not trained and task == "classification":
        return {"parameters": 0}  # its layers are in the classifier's head
    labels = len(texts)
    expected = strategy.trainable_parameters(shape, task=task, labels=labels)
    expected -= strategy.head_parameters(shape, labels) if task == "classification" else 0
    count = sum(weight.numel() for weight in trained)
    if count != expected:
        raise ValueError(f"it trains {count:,} parameters where {expected:,} were expected")
    strategy.begin(model, 10)
    model.eval()
    started = _apart(_outputs(model, texts), base, scale) if not len(lead) else None
    if started is not None and started > STRATEGY_BOUND:
        raise ValueError(f"it starts {started:.2g} away from the base")
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    losses = []
    for step in range(1, 4):
        loss = _mean_loss(_plain(model), texts)
        if (more := strategy.regulariser(model)) is not None:
            loss = loss + more
        loss.backward()
        strategy.after_step(model, step)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    if not all(map(math.isfinite, losses)) or losses[-1] == losses[0]:
        raise ValueError(f"its loss does not move: {losses[0]:.4g} to {losses[-1]:.4g}")
    with tempfile.TemporaryDirectory() as folder:
        strategy.save(model, Path(folder))
        ended = _outputs(model, texts)
        if strategy.adapter:
            again = _apart(_outputs(strategy.load(copy.deepcopy(base_model), Path(folder)).eval(), texts), ended, scale)
            if again > STRATEGY_BOUND:
                raise ValueError(f"loaded again, its logits are {again:.2g} away from those that were saved")
    return {"parameters": count, "loss_before": losses[0], "loss_after": losses[-1]}


def _plain(model: Any) -> Any:
    """The model inside a wrapper of peft's, which may go past a model's hooks."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _outputs(model: Any, texts: list[torch.Tensor]) -> torch.Tensor:
    """What a pack of the texts gives, its padding with it."""
    with torch.no_grad():
        return _read(_plain(model), **_pack(model, texts))


if __name__ == "__main__":
    os.nice(5)
    main(sys.argv[1:])
