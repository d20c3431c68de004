"""Graders that ask a model while a job trains: through the supervisor, since the trainer has no network; and a judge that goes away."""

from __future__ import annotations

import http.server
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from app import events
from app.db import transaction
from app.errors import BadRequest, Unavailable
from app.graders import GradeError, JudgeAsk, Reply, RewardAsk
from app.inference.questions import Question, QuestionAnswer
from app.jobs import service as jobs
from app.jobs.request import read_order
from app.kit import ids
from app.tables import Job, Model, TokenUse
from tests.factories import make_dataset
from tests.inference.test_external_servers import allow
from tests.warm import warm_attempts  # noqa: F401
from tests.worker.supervision.test_train_attempt import new_job, now_of, said  # noqa: F401
from worker.supervision import answering, job_turn
from worker.supervision.answering import answered
from worker.training.asking import Asker

pytestmark = pytest.mark.timeout(240)
ASK = JudgeAsk("judge", ({"role": "user", "content": "How good?"},))
JUDGE = {"type": "score_model", "name": "vowels", "model": "judge", "input": [{"role": "user", "content": "{{sample.output_text}}"}]}


class Judging(http.server.BaseHTTPRequestHandler):
    """An OpenAI-compatible server that gives a text the share of its vowels; gone after so many questions."""

    def do_POST(self) -> None:  # the name http.server calls
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.asked += 1  # type: ignore[attr-defined]
        if self.server.asked > self.server.most:  # type: ignore[attr-defined]
            return self.close_connection_now()
        text = body["messages"][-1]["content"].rpartition("\n\nAnswer with")[0]
        score = sum(c in "aeiou" for c in text) / (1 + len(text))
        part = {"choices": [{"index": 0, "delta": {"content": json.dumps({"result": round(score, 4)})}, "finish_reason": "stop"}]}
        usage = {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 5}}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(f"data: {json.dumps(part)}\n\ndata: {json.dumps(usage)}\n\ndata: [DONE]\n\n".encode())

    def close_connection_now(self) -> None:
        self.close_connection = True
        self.connection.close()

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def judge(session, monkeypatch, tiny_registered):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Judging)
    server.asked, server.most = 0, 10**9  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/v1"
    allow(monkeypatch, address)
    row = session.get_one(Model, tiny_registered.id)
    about = {name: getattr(row, name) for name in ("kind", "path", "revision", "source", "shape", "bytes", "license")}
    session.add(Model(name="judge", title="Judge", engine={"url": address, "model": "x", "via": "chat"}, **about))
    session.commit()
    yield server
    server.shutdown()
    server.server_close()


def order_of(session, user, data_dir: Path) -> dict[str, Any]:
    own = {"grader": JUDGE, "group_size": 4, "prompts_per_step": 3, "answer_tokens": 10, "check_prompts": 2}
    run = {
        "max_steps": 5, "eval_steps": 2, "evaluations_per_epoch": 0, "validation_fraction": 0.2, "graded_rows": 5, "max_tokens_per_step": 256,
        "samples": 0, "forgetting": False, "precision": "fp32", "epochs": 5, "learning_rate": 1e-2, "save_steps": 4,
    }  # fmt: skip
    dataset = ids.public(ids.DATASET, make_dataset(session, user, data_dir, 24).id)
    return {"model": "tiny", "dataset_id": dataset, "task": "reinforcement", "preference": own, "run": run}


def figures(job: Job) -> dict[int, Any]:
    return {e.data["step"]: (e.data["loss"], e.data["grad_norm"], e.data["metrics"]) for e in said(job, "step")}


@pytest.mark.long
@pytest.mark.usefixtures("warm_attempts", "new_job")
@pytest.mark.parametrize("most", [8 + 12 + 17, 8 + 5 + 12 * 2 + 2], ids=["while grading a step", "while grading an evaluation"])
def test_a_judge_that_goes_away_pauses_the_job_and_nothing_is_lost(session, user, data_dir, judge, monkeypatch, most) -> None:
    monkeypatch.setattr(answering, "PAUSES", (0.05, 0.1))
    order = order_of(session, user, data_dir)
    whole, cut = (jobs.create(session, user, read_order(order | {"name": name})) for name in ("whole", "cut"))
    session.commit()
    job_turn.work(whole.id)
    assert now_of(whole).status == "succeeded", now_of(whole).error
    assert judge.asked >= 2 * 4 + 2 + 5 * 12 + 5 * 3  # the check with its references, five steps, three evaluations of at least a row each

    judge.asked, judge.most = 0, most
    job_turn.work(cut.id)
    row = now_of(cut)
    assert (row.status, row.error["code"]) == ("paused", "model_away"), row.error
    assert "vowels could not ask its model" in row.error["message"] and "resume" in row.error["hint"]
    (stop,) = said(cut, "stopped")
    assert stop.data["reason"] == row.error["message"]
    before = max(figures(cut), default=0)
    judge.most = 10**9
    with transaction() as other:
        jobs.resume(other, user, cut.id)
    job_turn.work(cut.id)
    row = now_of(cut)
    assert row.status == "succeeded", row.error
    assert [e.data["resumed_from"] for e in said(cut, "started")] == [None, before or None][: len(said(cut, "started"))]
    assert all(e.data["exact"] for e in said(cut, "started")) and figures(cut) == figures(whole)
    with transaction() as other:
        one, two = (other.scalars(select(Model).where(Model.job_id == job.id)).one().adapter_sha256 for job in (whole, cut))
        assert one == two and other.scalars(select(TokenUse)).first() is not None
    scored = [[(e.data["step"], e.data["metrics"]["reward"]) for e in said(job, "evaluated")] for job in (whole, cut)]
    assert sorted(set(scored[0])) == sorted(set(scored[1]))


@pytest.mark.long
@pytest.mark.usefixtures("new_job")
def test_a_confined_trainer_asks_through_its_supervisor(session, user, data_dir, judge) -> None:
    """Started as the studio does, behind all walls, which let no socket through."""
    order = order_of(session, user, data_dir)
    job = jobs.create(session, user, read_order(order | {"run": order["run"] | {"max_steps": 1, "row_losses": False}}))
    session.commit()
    job_turn.work(job.id)
    assert now_of(job).status == "succeeded", now_of(job).error
    (step,) = said(job, "step")
    assert 0 < step.data["metrics"]["reward"] < 1 and judge.asked >= 8 + 12


def test_what_is_away_is_asked_again_and_what_is_refused_is_not() -> None:
    tried: list[Any] = []

    def answer(ask: Any) -> Reply:
        tried.append(ask)
        if ask.model == "busy" and len(tried) < 3:
            raise Unavailable("Nobody is there.")
        if ask.model == "gone":
            raise Unavailable("Nobody is there.")
        if ask.model == "refuses":
            raise BadRequest("Too long.")
        return Reply(reward=0.5)

    def through(model: str) -> tuple[QuestionAnswer, int]:
        tried.clear()
        return answered(Question.of(4, RewardAsk(model, ({"role": "assistant", "content": "x"},))), answer, lambda _: None), len(tried)

    assert through("busy") == (QuestionAnswer(id=4, reply=Reply(reward=0.5)), 3)
    gone, times = through("gone")
    assert gone.away and gone.reply is None and "Nobody is there" in gone.error and times == 1 + len(answering.PAUSES)
    assert through("refuses") == (QuestionAnswer(id=4, error=str(BadRequest("Too long."))), 1)
    greedy = Question.of(1, JudgeAsk("busy", ASK.messages, max_tokens=10**6))
    assert "no question" in answered(greedy, answer, lambda _: None).error and "no question" in answered(Question(id=2), answer).error


def test_replies_come_in_any_order_and_a_supervisor_that_has_gone_is_away() -> None:
    reads, asks = os.pipe()
    hears, writes = os.pipe()
    asker, found = Asker(asks, hears), dict[str, Any]()

    def ask(model: str) -> None:
        try:
            found[model] = asker(JudgeAsk(model, ASK.messages)).text
        except GradeError as error:
            found[model] = error.kind

    threads = [threading.Thread(target=ask, args=(name,)) for name in ("one", "two", "three")]
    for thread in threads:
        thread.start()
    with os.fdopen(reads, "rb") as questions, os.fdopen(writes, "wb") as answers:
        got = [Question.model_validate_json(questions.readline()) for _ in threads]
        for question in sorted(got, key=lambda one: one.judge.model, reverse=True)[:2]:  # type: ignore[union-attr]
            answers.write(QuestionAnswer(id=question.id, reply=Reply(text=f"of {question.judge.model}")).model_dump_json().encode() + b"\n")  # type: ignore[union-attr]
            answers.flush()
    for thread in threads:
        thread.join(10)
    assert found == {"two": "of two", "three": "of three", "one": "model_grader_server_error"}
    with pytest.raises(GradeError) as caught:
        asker(ASK)
    assert caught.value.kind == "model_grader_server_error"


def test_the_pausing_failures_are_failures() -> None:
    assert set(events.FailureKind.__args__) >= events.PAUSING and not events.PAUSING & events.TRANSIENT
