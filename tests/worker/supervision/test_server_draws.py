"""Answers of reinforcement that another server draws: with the adapter of each step, through the supervisor; and a server that goes away."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from app.db import transaction
from app.errors import BadField, Unavailable
from app.inference import external_servers
from app.inference.protocol import ExternalEngine
from app.inference.questions import DrawAsk
from app.inference.server_draws import ServerDraws
from app.jobs import service as jobs
from app.jobs.request import read_order
from app.kit import ids
from app.tables import Model
from tests.factories import make_dataset
from tests.generating import answering_dir  # noqa: F401
from tests.inference.test_external_servers import KEY, outside, state, url  # noqa: F401
from tests.warm import warm_attempts  # noqa: F401
from tests.worker.supervision.test_train_attempt import new_job, now_of, said  # noqa: F401
from worker.supervision import answering, job_turn

pytestmark = pytest.mark.timeout(240)
REWARD = {
    "type": "python",
    "name": "vowels",
    "source": "def grade(sample, item):\n    t = sample['output_text']\n    return sum(c in 'aeiou' for c in t) / (1 + len(t))",
}
ASK = DrawAsk(prompt=(5, 6, 7), count=2, most=4, stops=(2,), seed=1)


def order_of(session, user, data_dir: Path, **more: Any) -> dict[str, Any]:
    own = {"grader": REWARD, "group_size": 4, "prompts_per_step": 3, "answer_tokens": 10, "check_prompts": 2, "sampler": "server"}
    run = {
        "max_steps": 3, "evaluations_per_epoch": 0, "validation_fraction": 0.2, "graded_rows": 5, "max_tokens_per_step": 256, "samples": 0,
        "forgetting": False, "row_losses": False, "precision": "fp32", "epochs": 5, "learning_rate": 3e-2,
    }  # fmt: skip
    dataset = ids.public(ids.DATASET, make_dataset(session, user, data_dir, 24).id)
    return {
        "model": "tiny",
        "dataset_id": dataset,
        "task": "reinforcement",
        "preference": own,
        "run": run,
        "strategy": {"name": "lora"},
    } | more


@pytest.fixture
def served(session, url, tiny_registered) -> Model:  # noqa: F811
    model = session.get_one(Model, tiny_registered.id)
    external_servers.register(model, url, "served-base")
    session.commit()
    return model


@pytest.mark.long
@pytest.mark.usefixtures("warm_attempts", "new_job", "served")
def test_the_server_draws_with_the_adapter_of_each_step(session, user, data_dir, outside, tmp_path) -> None:  # noqa: F811
    before = state(outside)
    job = jobs.create(session, user, read_order(order_of(session, user, data_dir)))
    session.commit()
    (tmp_path / "adapter_model.safetensors").write_bytes(b"of an attempt whose supervisor was killed")
    httpx.post(
        f"http://127.0.0.1:{outside}/v1/load_lora_adapter", headers={"authorization": f"Bearer {KEY}"},
        json={"lora_name": f"luthier-{job.id.hex[:12]}-0-7", "lora_path": str(tmp_path)},
    ).raise_for_status()  # fmt: skip
    job_turn.work(job.id)
    assert now_of(job).status == "succeeded", now_of(job).error
    steps = [e.data["metrics"] for e in said(job, "step")]
    assert len(steps) == 3 and all(step["ratio_std"] < 1e-4 for step in steps), (
        steps
    )  # the newest weights drew, or this would be far larger
    assert steps[0]["reward"] != steps[2]["reward"]
    after = state(outside)
    asked = after["asked"][len(before["asked"]) :]
    models = [body["model"] for body in asked]
    assert models[:2] == ["served-base"] * 2 and [name.rpartition("-")[2] for name in models[2:]] == [*"000", *"111", *"222"]
    assert all(body["n"] == 4 and body["max_tokens"] == 10 and body["temperature"] == 1.0 for body in asked)
    assert len({body["seed"] for body in asked}) == len(asked)
    assert after["loads"] - before["loads"] == 4 and after["loaded"] == before["loaded"], "an adapter was left on the server"


@pytest.mark.long
@pytest.mark.usefixtures("warm_attempts", "new_job", "served")
def test_a_server_that_goes_away_pauses_the_job(session, user, data_dir, monkeypatch) -> None:
    monkeypatch.setattr(answering, "PAUSES", (0.05,))
    real, asked = ServerDraws.__call__, []

    def draw(self: ServerDraws, ask: DrawAsk) -> Any:
        asked.append(ask.adapter)
        if ask.adapter == "1" and asked.count("1") <= 6:  # each of three prompts is asked twice
            raise Unavailable("Nobody is there.")
        return real(self, ask)

    monkeypatch.setattr(ServerDraws, "__call__", draw)
    job = jobs.create(session, user, read_order(order_of(session, user, data_dir)))
    session.commit()
    job_turn.work(job.id)
    row = now_of(job)
    assert (row.status, row.error["code"]) == ("paused", "model_away"), row.error
    assert "draws the answers could not be asked" in row.error["message"] and "resume" in row.error["hint"]
    with transaction() as other:
        jobs.resume(other, user, job.id)
    job_turn.work(job.id)
    assert now_of(job).status == "succeeded", now_of(job).error
    assert sorted({e.data["step"] for e in said(job, "step")}) == [1, 2, 3]

    with transaction() as other:  # and one that is taken away from the base
        later = jobs.create(other, user, read_order(order_of(other, user, data_dir)))
        external_servers.remove(other.get_one(Model, later.model_id))
    job_turn.work(later.id)
    assert now_of(later).status == "paused" and "No server that takes tokens" in now_of(later).error["message"]


@pytest.mark.long
@pytest.mark.usefixtures("new_job", "served")
def test_a_confined_trainer_has_a_server_draw(session, user, data_dir, outside) -> None:  # noqa: F811
    """Started as the studio does, behind all walls, which let no socket through."""
    order = order_of(session, user, data_dir)
    job = jobs.create(session, user, read_order(order | {"run": order["run"] | {"max_steps": 1}}))
    session.commit()
    job_turn.work(job.id)
    assert now_of(job).status == "succeeded", now_of(job).error
    assert state(outside)["loaded"] == []


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"strategy": {"name": "dora"}}, "plain LoRA only"),
        ({"strategy": {"name": "lora", "modules_to_save": "embed_tokens"}}, "plain LoRA only"),
        ({"strategy": {"name": "full"}}, "plain LoRA only"),
        ({"preference": {"max_turns": 2}}, "only where the worker draws"),
        ({"resources": {"gpus": 2}}, "several processes"),
    ],
)
def test_what_a_server_cannot_draw_is_refused(session, user, data_dir, more, says, served) -> None:
    order = order_of(session, user, data_dir)
    with pytest.raises(BadField, match=says) as caught:
        jobs.create(session, user, read_order(order | more | {"preference": order["preference"] | more.get("preference", {})}))
    assert caught.value.param == "preference.sampler"


def test_without_a_server_it_is_refused(session, user, data_dir, tiny_registered) -> None:
    with pytest.raises(BadField, match="No server that takes tokens"):
        jobs.create(session, user, read_order(order_of(session, user, data_dir)))


@pytest.mark.long
def test_only_an_adapter_of_the_attempt_is_loaded(url, tmp_path) -> None:  # noqa: F811
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "3").symlink_to(tmp_path / "elsewhere")
    draws = ServerDraws(ExternalEngine(url=url, model="served-base"), tmp_path / "served", "luthier-x")
    for name in ("3", "4"):
        with pytest.raises(Unavailable, match="has no adapter"):
            draws(ASK.model_copy(update={"adapter": name}))
    one, two = draws(ASK)
    assert len(one.ids) == len(one.nats) <= 4 and one != two
