"""Parts of a pack side by side: the same gradients as the whole pack gives, and the same to the bit every time."""

from __future__ import annotations

import random
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from app import events
from app.kit import manifest
from app.settings import get_settings
from app.strategies import STRATEGIES
from tests.worker.orders import WarmTrainer, chat_rows, order, put_dataset, put_model
from worker import train
from worker.data.packing import divide
from worker.kernels.cpu.full_tuning import add_parts, patch_full_tuning
from worker.modeling.classifier import plain
from worker.modeling.fused_layers import recompute_layers, speed_up
from worker.modeling.loading import load_tokenizer
from worker.runtime.device import Compute, choose
from worker.runtime.thread_parallel import ThreadParallel
from worker.scoring import held_out
from worker.training import feature_cache
from worker.training.objectives import objective_of
from worker.training.objectives._base import body_of, trained_parameters


@pytest.fixture(autouse=True)
def four_threads(monkeypatch: pytest.MonkeyPatch):
    before = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    yield
    torch.set_num_threads(before)


def test_results_come_in_order_with_the_threads_shared_out() -> None:
    abreast = ThreadParallel(4)
    torch.set_num_threads(4)
    seen: dict[int, tuple[int, int, bool]] = {}

    def look(place: int) -> int:
        time.sleep(0.02 * (3 - place))
        seen[place] = (threading.get_ident(), torch.get_num_threads(), torch.is_grad_enabled())
        return place

    with torch.no_grad():
        assert abreast.map(look, [0, 1]) == [0, 1]
    assert {threads for _, threads, _ in seen.values()} == {2} and not any(grad for *_, grad in seen.values())
    assert len({thread for thread, *_ in seen.values()} | {threading.get_ident()}) == 3
    assert abreast.map(look, [0, 1, 2, 3]) == [0, 1, 2, 3]
    assert {threads for _, threads, _ in seen.values()} == {1} and all(grad for *_, grad in seen.values())
    assert torch.get_num_threads() == 4
    assert abreast.map(look, [0]) == [0] and seen[0][:2] == (threading.get_ident(), 4), "one part runs where it was asked for"
    with pytest.raises(ValueError, match="5 parts for 4 threads"):
        abreast.map(look, range(5))


def test_what_fails_is_told_when_all_have_ended() -> None:
    ended = []

    def act(place: int) -> None:
        time.sleep(0.02 * place)
        ended.append(place)
        if place in (1, 3):
            raise ArithmeticError(f"part {place}")

    with pytest.raises(ArithmeticError, match="part 1"):
        ThreadParallel(4).map(act, range(4))
    assert sorted(ended) == [0, 1, 2, 3]


def test_gradients_are_added_in_order_whoever_is_faster() -> None:
    """Sums of numbers so unlike that another order gives another sum, to one parameter that all parts reach and to some that a
    part leaves out; a part that fails on its way back keeps nobody waiting."""
    abreast, draw = ThreadParallel(4), random.Random(3)
    shared, own = torch.nn.Parameter(torch.zeros(64)), [torch.nn.Parameter(torch.zeros(64)) for _ in range(3)]
    scales = [1.0, 1e8, -1e8, 3.0]

    def part(place: int, delay: float = 0.0, fails: bool = False) -> None:
        time.sleep(delay)
        noise = torch.randn(64, generator=torch.Generator().manual_seed(place)) * scales[place]
        loss = (shared * noise).sum()
        for other, parameter in enumerate(own):
            if other != place:
                loss = loss + (parameter * noise).sum()
        if fails:
            loss.register_hook(lambda _: (_ for _ in ()).throw(ArithmeticError("on the way back")))
        loss.backward()

    def gradients() -> list[torch.Tensor]:
        found = [p.grad for p in (shared, *own)]
        for p in (shared, *own):
            p.grad = None
        return found

    for place in range(4):
        part(place)
    expected = gradients()
    for place in reversed(range(4)):
        part(place)
    assert not torch.equal(expected[0], gradients()[0]), "the order has to matter"
    with abreast.in_order([shared, *own]):
        for _ in range(20):
            delays = [draw.choice((0.0, 0.01)) for _ in range(4)]
            abreast.map(lambda place: part(place, delays[place]), range(4))  # noqa: B023
            assert all(torch.equal(a, b) for a, b in zip(expected, gradients(), strict=True))
        with pytest.raises(ArithmeticError):
            abreast.map(lambda place: part(place, fails=place == 1), range(4))
    assert not shared._backward_hooks


ABLE = [(name, task) for name, kind in STRATEGIES.items() for task in kind.tasks if kind.recipe != "features"]


@pytest.mark.parametrize(("name", "task"), ABLE)
def test_parts_give_the_gradients_of_the_whole(data_dir: Path, tiny_model: Path, name: str, task: str) -> None:
    """For every strategy, with a layer computed anew: losses, what is measured besides, and gradients."""
    model, settings = put_model(tiny_model), {}
    if why := STRATEGIES[name]().unavailable(model.shape, task=task, cuda=torch.cuda.is_available()):
        pytest.skip(why)
    if "dropout" in STRATEGIES[name].model_fields:
        settings["dropout"] = 0.0
    spec = order(model, put_dataset(ROWS[task], FORMATS[task]), name, settings, max_tokens_per_step=1024)
    spec = spec.model_copy(update={"task": task})
    torch.manual_seed(4)
    engine, lesson = choose(spec.run, spec.strategy), objective_of(spec, load_tokenizer(model))
    made = lesson.load(engine)
    list(lesson.prepare(made, engine, data_dir / "runs" / "one" / "a1", 1024))
    made = lesson.attach(made).train()
    assert recompute_layers(plain(made), 1, spec.strategy.reaches(model.shape)) == min(1, spec.strategy.reaches(model.shape))
    speed_up(body_of(made), engine, 0.0)
    trained = trained_parameters(made)
    wholes = [] if type(spec.strategy).adapter else patch_full_tuning(body_of(made), engine)
    # What starts at zero would hide what it is multiplied with; margins are differences of likelihoods, and small ones all rounding.
    size = 0.1 if task == "preference" else 0.02
    with torch.no_grad():
        for parameter in trained.values():
            parameter += size * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    pack = list(range(len(lesson.train)))
    parts = divide(pack, lesson.train.lengths, 3)
    assert len(parts) == 3

    def step(groups: list[list[int]]) -> tuple[list, dict[str, torch.Tensor]]:
        def one(rows: list[int]) -> tuple:
            found = lesson.loss(made, lesson.batch(rows, engine), engine)
            (found.loss / len(pack)).backward()
            return found._replace(loss=found.loss.detach().double())

        found = engine.abreast.map(one, groups)
        add_parts(wholes)
        gradients = {key: p.grad for key, p in trained.items() if p.grad is not None}
        for p in trained.values():
            p.grad = None
        return [sum(values) for values in zip(*(f if f.measured is not None else f[:3] for f in found), strict=True)], gradients

    (whole, expected), (apart, found) = step([pack]), step(parts)
    for a, b in zip(whole, apart, strict=True):
        # A margin of two answers is the difference of float32 sums of tens of nats, which are whole to some 4e-6.
        assert torch.allclose(torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64), rtol=1e-5, atol=1e-5)
    assert found.keys() == expected.keys() and found
    for key, gradient in expected.items():
        assert (found[key] - gradient).abs().max() <= 2e-5 * gradient.abs().max() + 1e-8, key


LABELS = ("wood", "sound", "part")
ROWS = {
    "generation": chat_rows(),
    "classification": [{"text": row["messages"][1]["content"], "label": LABELS[i % 3]} for i, row in enumerate(chat_rows())],
    "preference": [
        {
            "messages": row["messages"][:1],
            "chosen": [row["messages"][1]],
            "rejected": [{"role": "assistant", "content": f"No {i}."}],
        }
        for i, row in enumerate(chat_rows())
    ],
}
FORMATS = {"generation": "chat", "classification": "classification", "preference": "preference"}


def plenty(data_dir: Path, tiny_model: Path, strategy: str = "lora", settings: dict | None = None, **run):
    """An order with packs of several parts."""
    return order(put_model(tiny_model), put_dataset(chat_rows(96)), strategy, settings, **{"max_tokens_per_step": 600, "epochs": 3} | run)


# Gradients of their own, past autograd where the units are, and added in order.
@pytest.mark.long
@pytest.mark.parametrize(("strategy", "threads"), [("lora", 4), ("lora", 2), ("full", 4)])
def test_a_job_in_parts_is_reproducible_and_goes_on_where_it_was_killed(
    data_dir: Path, tiny_model: Path, strategy: str, threads: int
) -> None:
    spec = plenty(data_dir, tiny_model, strategy, micro_batches=2, max_tokens_per_step=1200, evaluations_per_epoch=2)
    whole, code = WarmTrainer(spec, "whole", 1, threads=threads).run()
    assert code == 0
    started = next(e for e in whole if isinstance(e, events.Started))
    assert started.details["parts"] == 2
    assert started.details.get("whole", False) == (strategy == "full"), "one saved before there were such layers is not called exact"
    killed = WarmTrainer(spec, "killed", 1, threads=threads)
    for event in killed:
        if isinstance(event, events.Saved):
            killed.kill()
            break
    killed.wait()
    again, code = WarmTrainer(spec, "killed", 2, threads=threads).run()
    assert code == 0
    resumed = next(e for e in again if isinstance(e, events.Started))
    assert resumed.exact and resumed.resumed_from
    losses = {e.step: (e.loss, e.grad_norm) for e in whole if isinstance(e, events.Step)}
    assert all(losses[e.step] == (e.loss, e.grad_norm) for e in again if isinstance(e, events.Step))
    assert _weights(again[-1]) == _weights(whole[-1])


def _weights(finished: events.Finished) -> dict[str, str]:
    made = manifest.verify(get_settings().data_dir / finished.path)
    return {name: entry["sha256"] for name, entry in made["files"].items() if name.endswith(".safetensors")}


@pytest.mark.long
def test_parts_learn_what_the_whole_learns(data_dir: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = plenty(data_dir, tiny_model)
    apart = list(train.train(spec, data_dir / "runs" / "apart" / "a1"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    whole = list(train.train(spec, data_dir / "runs" / "whole" / "a1"))
    parts = [next(e for e in said if isinstance(e, events.Started)).details["parts"] for said in (apart, whole)]
    assert parts == [2, 1]
    steps = [[e for e in said if isinstance(e, events.Step)] for said in (apart, whole)]
    assert len(steps[0]) == len(steps[1]) > 3
    for a, b in zip(*steps, strict=True):
        assert (a.tokens, a.trained_tokens) == (b.tokens, b.trained_tokens)
        assert a.loss == pytest.approx(b.loss, rel=1e-3) and a.grad_norm == pytest.approx(b.grad_norm, rel=5e-3)
    assert [e.loss for e in apart if isinstance(e, events.Evaluated)] == pytest.approx(
        [e.loss for e in whole if isinstance(e, events.Evaluated)], rel=1e-3
    )


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["loha", "lokr"])
def test_loha_and_lokr_are_taken_apart(data_dir: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, strategy: str) -> None:
    """peft draws a number in every pass of them, for a dropout that these jobs do not have. Their parts learn the same twice, and what the
    whole learns."""

    def run(name: str, **settings: float) -> tuple[int, list[tuple[float, float]]]:
        spec = plenty(data_dir, tiny_model, strategy, {"dropout": 0.0} | settings, max_steps=4)
        said = list(train.train(spec, data_dir / "runs" / name / "a1"))
        parts = next(e for e in said if isinstance(e, events.Started)).details["parts"]
        return parts, [(e.loss, e.grad_norm) for e in said if isinstance(e, events.Step)]

    apart, again, dropped = run("apart"), run("again"), run("dropped", dropout=0.1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    whole = run("whole")
    assert [found[0] for found in (apart, again, dropped, whole)] == [2, 2, 1, 1]
    assert apart == again and len(apart[1]) == 4 and len(set(apart[1])) == 4
    for ours, other in zip(apart[1], whole[1], strict=True):
        assert ours == pytest.approx(other, rel=5e-3)


def test_what_draws_at_random_is_not_taken_apart(data_dir: Path, tiny_model: Path) -> None:
    """Dropout in parts side by side would depend on which was faster."""
    said = list(train.train(plenty(data_dir, tiny_model, settings={"dropout": 0.2}, epochs=1), data_dir / "runs" / "one" / "a1"))
    assert next(e for e in said if isinstance(e, events.Started)).details["parts"] == 1


def test_scores_and_vectors_in_parts(data_dir: Path, tiny_model: Path) -> None:
    spec = plenty(data_dir, tiny_model)
    lesson, engine = objective_of(spec, load_tokenizer(spec.model)), choose(spec.run, spec.strategy)
    alone = Compute(**{f: getattr(engine, f) for f in ("device", "name", "precision", "frozen")}, threads=1)
    model = lesson.load(engine)
    assert [engine.parts(n) for n in (255, 256, 1024, 1536, 4096)] == [1, 2, 2, 3, 4]
    assert replace(engine, device=torch.device("cuda")).parts(4096) == 1
    ours, theirs = (held_out.score_rows(model, lesson.train, 1536, one) for one in (engine, alone))
    assert ours.hits == theirs.hits and ours.tokens == theirs.tokens and ours.nats == pytest.approx(theirs.nats, rel=1e-4)

    from worker.modeling.classifier import Classifier, load_backbone

    stack = Classifier(load_backbone(spec.model, attention="luthier_packed"), torch.nn.Identity(), "mean", normalise=True)
    texts = [row["messages"][1]["content"] for row in chat_rows(96)]
    found = []
    for one in (engine, alone):
        making = feature_cache.embed(stack, load_tokenizer(spec.model), texts, one, max_length=64)
        try:
            while True:
                next(making)
        except StopIteration as done:
            found.append(torch.from_numpy(done.value))
    assert torch.allclose(*found, atol=1e-5)
