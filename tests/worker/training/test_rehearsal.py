"""Rehearsal: the base's own answers to general prompts, written once and played in."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from app import events
from app.errors import BadData
from app.kit import ids
from app.machines.hardware import Machine
from app.planning import duration
from app.planning.memory import pack_tokens
from app.settings import get_settings
from app.spec import JobSpec
from tests import lives
from tests.worker.orders import WarmTrainer, chat_rows, order, put_dataset, put_model
from tests.worker.training.test_settings import in_two, of, run, same
from worker import train
from worker.data.chat_template import prepare_tokenizer
from worker.modeling import packed_attention
from worker.modeling.loading import load_plain, load_tokenizer
from worker.runtime import distributed
from worker.runtime.device import choose
from worker.runtime.progress import drained
from worker.scoring import forgetting, held_out
from worker.training import rehearsal
from worker.training.objectives import objective_of
from worker.training.schedule import course_of

SHARE = 0.2


@pytest.fixture
def spec(data_dir: Path, tiny_model: Path, monkeypatch) -> JobSpec:
    monkeypatch.setattr(rehearsal, "prompts", lambda kind: ALL[kind][:20])
    return order(put_model(tiny_model), put_dataset(chat_rows()), rehearsal_fraction=SHARE, max_tokens_per_step=480, epochs=24)


ALL = {kind: rehearsal.prompts(kind) for kind in ("dialogue", "generic")}


def cached() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in get_settings().folder("features").glob("rehearsal-*/*.json")}


def base_of(spec: JobSpec):
    """(engine, base, tokenizer) as a trainer has them before its strategy is attached."""
    engine, tokenizer = choose(spec.run, spec.strategy), load_tokenizer(spec.model)
    prepare_tokenizer(tokenizer)
    return engine, load_plain(spec.model, engine.frozen, packed_attention.NAME), tokenizer


@pytest.mark.long
def test_a_job_has_the_share_it_asked_for_and_resumes_bit_for_bit(spec: JobSpec, data_dir: Path) -> None:
    whole = run(spec, data_dir)
    first = cached()
    assert sorted(first) == ["000.json", "016.json"]
    (started,) = of(whole, events.Started)
    assert started.details["general_rows"] == 20 and started.details["general_rows_played"] > 20
    assert abs(started.details["general_share"] - SHARE) < 0.02
    own = of(run(spec.model_copy(update={"run": spec.run.model_copy(update={"rehearsal_fraction": 0.0})}), data_dir, "own"), events.Step)
    last = of(whole, events.Step)[-1]
    assert last.tokens * (1 - started.details["general_share"]) == pytest.approx(own[-1].tokens, rel=0.01)
    assert len(of(whole, events.Step)) > len(own), "the same rows in more steps"
    assert any("General rows are played in" in e.message for e in of(whole, events.Log))
    same(in_two(spec, data_dir, 3), whole)
    assert cached() == first


@pytest.mark.long
def test_a_job_killed_while_the_base_answers_ends_with_the_same_weights(spec: JobSpec, data_dir: Path) -> None:
    spec = spec.model_copy(update={"run": spec.run.model_copy(update={"epochs": 2.0})})
    said, code = WarmTrainer(spec, "killed", 1, die_at=3).run()  # fsync of the second file of answers
    assert code == -9 and not of(said, events.Started) and sorted(cached()) == ["000.json"]
    said, code = WarmTrainer(spec, "killed", 2).run()
    assert code == 0
    interrupted = cached()
    for path in get_settings().folder("features").glob("rehearsal-*/*.json"):
        path.unlink()
    whole, _ = WarmTrainer(spec, "whole", 1).run()
    same(said, whole)
    assert cached() == interrupted


@pytest.mark.long
def test_other_answers_than_those_it_began_with_are_told(spec: JobSpec, data_dir: Path) -> None:
    control = train.StopSignals()
    for event in train.train(spec, data_dir / "runs" / "job" / "a1", control=control):
        control.stop |= isinstance(event, events.Step)
    path = next(get_settings().folder("features").glob("rehearsal-*/000.json"))
    rows = json.loads(path.read_text())
    path.write_text(json.dumps([rows[1], *rows[1:]]))
    said = list(train.train(spec, data_dir / "runs" / "job" / "a2"))
    assert not of(said, events.Started)[0].exact
    assert any("general" in e.message and "bit for bit" in e.message for e in of(said, events.Log))


def test_only_answers_have_a_loss_and_they_are_the_bases_own(spec: JobSpec) -> None:
    engine, model, tokenizer = base_of(spec)
    before = torch.get_rng_state()
    data = drained(rehearsal.general_rows(spec, tokenizer, model, engine, [], 1024))
    assert torch.equal(before, torch.get_rng_state()), "training draws what it would have drawn"
    for place, (start, end) in enumerate(zip(data.starts, data.starts[1:], strict=False)):
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": ALL["dialogue"][data.lines[place] - 1]}], add_generation_prompt=True, tokenize=False
        )
        answer = int(data.trained[start:end].sum())
        assert data.trained[start:end][-answer:].all() and tokenizer.decode(data.ids[start : end - answer].tolist()) == prompt
    stops = [tokenizer.eos_token_id]
    asked = [prompt for prompt, _ in json.loads(cached()["000.json"])]
    again = held_out.written(model, tokenizer, asked, stops, 96, engine, seed=rehearsal.SEED)
    assert again == [answer for _, answer in json.loads(cached()["000.json"])]
    other = held_out.written(model, tokenizer, asked, stops, 96, engine, seed=1)
    assert again != other
    assert all(token not in stops for answer in again for token in answer[:-1])
    with pytest.raises(BadData, match="No general row has room"):
        drained(rehearsal.general_rows(spec, tokenizer, model, engine, [], 4))


def test_at_the_base_the_answers_pull_nowhere(spec: JobSpec, tokenizer) -> None:
    """Drawn from the distribution as it is: as often as the model says, over many draws."""
    engine, model, tokenizer = base_of(spec)
    prompt = tokenizer("The river")["input_ids"]
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([prompt])).logits[0, -1].float().softmax(-1)
    drawn = [
        row[0]
        for seed in range(4)
        for row in held_out.written(model, tokenizer, [prompt] * 500, [tokenizer.eos_token_id], 1, engine, seed=seed)
    ]
    counts = torch.bincount(torch.tensor(drawn), minlength=len(expected)) / len(drawn)
    assert float((counts - expected).abs().sum()) < 2 * float(len(expected) / len(drawn)) ** 0.5
    assert float(expected.max()) < 0.9, "else there is nothing to draw"


@pytest.mark.parametrize("strategy", ["full", "prompt_tuning", "lora"])
def test_every_row_has_its_virtual_tokens(spec: JobSpec, data_dir: Path, strategy: str) -> None:
    order_ = order(spec.model, spec.dataset, strategy, rehearsal_fraction=SHARE, max_tokens_per_step=640, epochs=1)
    engine, model, tokenizer = base_of(order_)
    lesson = objective_of(order_, tokenizer)
    drained(lesson.prepare(model, engine, data_dir / "runs" / "x" / "a1", 640))
    lead, rows = len(lesson.lead), lesson.step_rows
    assert len(rows) == len(lesson.train) + 20 and lead == order_.strategy.virtual_tokens()
    for start in rows.starts[:-1]:
        assert rows.ids[start : start + lead].tolist() == lesson.lead and not rows.trained[start : start + lead].any()
    assert run(order_, data_dir)[-1].type == "finished"


def test_a_model_that_only_continues_texts_is_given_beginnings(data_dir: Path, tiny_model: Path, monkeypatch) -> None:
    monkeypatch.setattr(rehearsal, "prompts", lambda kind: ALL[kind][:3])
    texts = put_dataset([{"text": f"Number {n} is told of in a story."} for n in range(30)], "plain_text")
    spec = order(put_model(tiny_model, "generic"), texts, rehearsal_fraction=SHARE, max_tokens_per_step=640, epochs=1)
    said = run(spec, data_dir)
    assert said[-1].type == "finished" and of(said, events.Started)[0].details["general_rows"] == 3
    tokenizer = load_tokenizer(spec.model)
    (rows,) = cached().values()
    assert [tokenizer.decode(prompt, skip_special_tokens=True) for prompt, _ in json.loads(rows)] == ALL["generic"][:3]


def test_further_processes_read_what_the_first_one_wrote(spec: JobSpec, monkeypatch) -> None:
    engine, model, tokenizer = base_of(spec)
    first = drained(rehearsal.general_rows(spec, tokenizer, model, engine, [], 1024))
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    monkeypatch.setattr(held_out, "written", None)
    second = drained(rehearsal.general_rows(spec, tokenizer, model, engine, [], 1024))
    assert (first.ids == second.ids).all() and (first.trained == second.trained).all()


def test_the_estimate_counts_them(spec: JobSpec, data_dir: Path) -> None:
    engine, model, tokenizer = base_of(spec)
    lesson = objective_of(spec, tokenizer)
    course = course_of(lesson, engine)
    drained(lesson.prepare(model, engine, data_dir / "runs" / "x" / "a1", 640))

    class Stats:
        rows, characters, longest, labels = 24, 0, max(lesson.train.lengths), None
        tokens = sum([*lesson.train.lengths, *lesson.held_out.lengths])
        trained_tokens = tokens // 2

    planned = duration.course_of(spec, Stats())
    assert planned.steps == pytest.approx(course.total_steps, abs=6)
    packs = [pack for _, (_, _, pack) in zip(range(course.total_steps), course.packs(lesson), strict=False)]
    tokens = [sum(lesson.step_rows.lengths[row] for row in pack) for pack in packs]
    assert planned.tokens == pytest.approx(sum(tokens), rel=0.1)
    assert max(tokens) <= course.budget <= pack_tokens(spec.run, Stats.longest) + 1
    machine = Machine(cores=2, memory_bytes=2**33)
    bare = spec.model_copy(update={"run": spec.run.model_copy(update={"rehearsal_fraction": 0.0})})
    with_, without = (duration.estimate(s, Stats(), machine) for s in (spec, bare))
    assert with_.seconds > without.seconds and with_.memory_bytes > without.memory_bytes and with_.steps > without.steps


def test_no_prompt_is_of_the_probe_that_measures_forgetting() -> None:
    def words(text: str) -> set[str]:
        found = re.findall(r"[a-z0-9]+", text.lower())
        return {" ".join(found[i : i + 5]) for i in range(len(found) - 4)}

    probed = set().union(*(words(json.dumps(row)) for row in forgetting.probe_rows()))
    for prompts in ALL.values():
        assert len(prompts) == len(set(prompts))
        shared = {prompt: words(prompt) & probed for prompt in prompts if words(prompt) & probed}
        assert not shared


def test_the_page_of_a_run_says_how_many_were_played_in(client, session, user, tiny_registered) -> None:
    job = lives.order(session, user, tiny_registered, rehearsal_fraction=0.1)
    page = f"/jobs/{ids.public(ids.JOB, job.id)}?tab=data"
    assert "10% of each step's tokens" in client.get(page).text
    details = {"general_rows": 96, "general_rows_played": 184, "general_share": 0.1007}
    lives.Life(session, job).claim().say(lives.started().model_copy(update={"details": details}))
    assert "184 played in of 96, 10.1% of the tokens" in client.get(page).text
