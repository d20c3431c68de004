"""A studio with one of everything, and new ones of what a request takes away."""

from __future__ import annotations

import copy
import json
import shutil
import uuid
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from app import graders, saved_graders
from app.batches import service as batches
from app.datasets import ingest_task, resumable_upload
from app.datasets import service as datasets
from app.distillations import service as distillations
from app.evals import service as evals
from app.evals import sources
from app.evaluation import comparisons, gates
from app.evaluation import service as evaluations
from app.inference import playground, stored, votes
from app.inference.playground import AnswerFold
from app.inference.protocol import AnswerStarted, ChoiceFinished, Done, Sampling, TextPart
from app.inference.responses import ResponseFold
from app.kit import ids, manifest
from app.models import aliases, exports
from app.prompts import runs as prompt_runs
from app.prompts import service as prompts
from app.schemas.responses import ResponseBody
from app.searches import service as searches
from app.storage import files
from app.tables import (
    AliasMove,
    ApiKey,
    BrowserSession,
    Checkpoint,
    CheckpointPermission,
    Dataset,
    DistillationRun,
    Finding,
    Model,
    ModelAlias,
    PromptRun,
    User,
    WebhookEndpoint,
)
from app.web import auth, people, projects
from tests.factories import make_job
from tests.lives import Life, started, steps

Row = dict[str, Any]


def rows() -> list[Row]:
    good = [
        {"messages": [{"role": "user", "content": f"{n}. What wood?"}, {"role": "assistant", "content": f"Spruce {n}."}]} for n in range(40)
    ]
    return [*good, {"messages": []}, {"messages": [{"role": "user", "content": "Nobody answers "}]}, good[0]]


class World:
    """`ids` names one object of each kind that stays; `fresh(kind)` makes one that may be lost. Both give public ids."""

    def __init__(self, session: Session, user: User, data_dir: Path, base: Model, tiny_model: Path) -> None:
        self.session, self.user, self.data_dir, self.base = session, user, data_dir, base
        self.tiny_model = tiny_model
        self.ids: dict[str, str] = {}
        self.makers: dict[str, Callable[[], str]] = {
            name.removeprefix("_new_"): getattr(self, name) for name in dir(self) if name.startswith("_new_")
        }
        self._build()

    def fresh(self, kind: str) -> str:
        made = self.makers[kind]()
        self.session.commit()
        return made

    def _build(self) -> None:
        text = "\n".join(map(json.dumps, rows()))
        self.dataset, other = self._read(text + '\n{"broken\n'), self._read(text)
        life = Life(self.session, make_job(self.session, self.user, self.base, self.dataset)).claim()
        life.say(started(24), *steps(1, 24, 24)).finish(24)
        tuned = self.session.scalars(select(Model).where(Model.job_id == life.job_id)).one()
        (self.data_dir / tuned.path).mkdir(parents=True)
        (self.data_dir / tuned.path / "adapter_config.json").write_text("{}")
        tuned.revision = manifest.write(self.data_dir / tuned.path)["revision"]
        self.session.commit()
        checkpoint = self.session.scalars(select(Checkpoint).where(Checkpoint.job_id == life.job_id)).first()
        assert checkpoint is not None
        folder = self.data_dir / "import" / "tiny"
        shutil.copytree(self.tiny_model, folder)
        loop = self.data_dir / "import" / "loop"
        loop.symlink_to(loop)
        self.project = projects.create(self.session, self.user, "A project")
        self.version = prompts.create(self.session, self.user, "Say it", prompts.read_body({}))[1]
        self.ids = {
            "file": ids.public(ids.FILE, self.dataset.file_id),
            "train_file": ids.public(ids.FILE, other.file_id),
            "other": ids.public(ids.DATASET, other.id),
            "dataset": ids.public(ids.DATASET, self.dataset.id),
            "job": ids.public(ids.JOB, life.job_id),
            "model": ids.public(ids.MODEL, self.base.id),
            "model_name": self.base.name,
            "tuned": ids.public(ids.MODEL, tuned.id),
            "tuned_name": tuned.name,
            "checkpoint": f"{tuned.name}:ckpt-step-{checkpoint.step}",
            "prompt": ids.public(ids.PROMPT, self.version.prompt_id),
            "finding": str(self._finding()),
            "exchange": str(self._exchange()),
            "run": self._run(),
            "sha": "0" * 64,
            "own_project": ids.public(ids.PROJECT, self.user.id),
            "project": ids.public(ids.PROJECT, self.project.id),
        }
        self.session.commit()
        kinds = "evaluation export comparison vote key permission person invitation grader batch batch_file webhook eval eval_run completion response distillation search"
        for kind in kinds.split():
            self.ids[kind] = self.fresh(kind)

    def _read(self, text: str) -> Dataset:
        file = files.add_bytes(self.session, self.user, text.encode(), "chats.jsonl", "fine-tune")
        made = datasets.create(self.session, self.user, file)
        self.session.commit()
        ingest_task.read(made.id)
        self.session.refresh(made)
        assert made.status == "ready", made.error
        return made

    def _finding(self) -> int:
        return self.session.scalars(select(Finding.id).where(Finding.dataset_id == self.dataset.id).order_by(Finding.id)).first() or 0

    def _exchange(self) -> uuid.UUID:
        exchange, asked = playground.ask(self.session, self.user, [self.base.name], "What wood?", Sampling())
        heard = AnswerFold()
        said = [
            AnswerStarted(rendered_prompt="What wood?", prompt_tokens=3, max_tokens=8, context=64),
            TextPart(index=0, text="Spruce.", tokens=3),
        ]
        heard.take([*said, Done(prompt_tokens=3, completion_tokens=2, first_token_seconds=0.1, tokens_per_second=20.0)])
        playground.record(self.session, exchange.id, asked[0], heard)
        return exchange.id

    def _new_completion(self) -> str:
        """A chat completion that is stored."""
        message = {"role": "assistant", "content": "Spruce.", "refusal": None, "annotations": []}
        choices = [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}]
        usage = AnswerFold().usage()
        answer = {"object": "chat.completion", "created": 1, "system_fingerprint": "fp_0", "choices": choices, "usage": usage}
        return self._stored(ids.CHAT_COMPLETION, stored.COMPLETION, answer)

    def _new_response(self) -> str:
        """A response that is stored."""
        made = ResponseFold({**ResponseBody(model=self.base.name, input="What wood?").echoed(), "object": "response", "output": []}, lambda _: [])  # fmt: skip
        made.take([TextPart(index=0, text="Spruce.", tokens=3), ChoiceFinished(index=0, reason="stop", tokens=3)])
        made.end(AnswerFold().usage(), {}, 2)
        item = {
            "id": "msg_1",
            "type": "message",
            "status": "completed",
            "role": "user",
            "content": [{"type": "input_text", "text": "What wood?"}],
        }
        more = {"created_at": 1, "background": False, "error": None, "input": [item]}
        return self._stored(ids.RESPONSE, stored.RESPONSE, {**made.response, **more})

    def _stored(self, prefix: str, source: str, answer: Row) -> str:
        proof = {"model": self.base.name, "revision": "0", "adapter_sha256": None, "engine": None, "seeds": [1]}
        proof |= {"first_token_seconds": None, "tokens_per_second": None}
        key = uuid.uuid4()
        playground.record_call(
            self.session, self.user, [], Sampling(), id=key, source=source, messages=[{"role": "user", "content": "What wood?"}],
            user_metadata={"team": "a"}, stored={**answer, "id": ids.public(prefix, key), "model": self.base.name, "luthier": proof},
        )  # fmt: skip
        return ids.public(prefix, key)

    def _run(self) -> str:
        order = prompt_runs.RunOrder(rows=5)
        run = prompt_runs.create(self.session, self.user, self.version, self.base.name, self.dataset, order)
        return ids.public(ids.RUN, run.id)

    # Makers -----------------------------------------------------------------------------------------------------------

    def _copy(self) -> Dataset:
        columns = {
            c.key: copy.deepcopy(getattr(self.dataset, c.key))
            for c in Dataset.__table__.columns
            if c.computed is None and c.key not in ("id", "created_at")
        }
        made = Dataset(id=uuid.uuid4(), **columns)
        self.session.add(made)
        self.session.flush()
        return made

    def _new_dataset(self) -> str:
        return ids.public(ids.DATASET, self._copy().id)

    def _new_file(self) -> str:
        return ids.public(ids.FILE, files.add_bytes(self.session, self.user, uuid.uuid4().bytes, "a.jsonl", "user_data").id)

    def _new_batch_file(self) -> str:
        line = {
            "custom_id": "a",
            "method": "POST",
            "url": "/v1/completions",
            "body": {"model": self.base.name, "prompt": "a", "max_tokens": 1},
        }
        return ids.public(ids.FILE, files.add_bytes(self.session, self.user, json.dumps(line).encode(), "a.jsonl", "batch").id)

    def _new_batch(self) -> str:
        order = {"input_file_id": self._new_batch_file(), "endpoint": "/v1/completions", "completion_window": "24h"}
        return ids.public(ids.BATCH, batches.create(self.session, self.user, batches.BatchOrder.model_validate(order)).id)

    def _new_webhook(self) -> str:
        made = WebhookEndpoint(
            id=uuid.uuid4(), owner_id=self.user.id, project_id=self.user.project_id, name="ci", url="https://hooks.example.com/a",
            event_types=["batch.failed"],
        )  # fmt: skip
        self.session.add(made)
        return ids.public(ids.WEBHOOK, made.id)

    def _new_eval(self) -> str:
        criterion = {
            "type": "string_check",
            "name": "right",
            "operation": "eq",
            "input": "{{sample.output_text}}",
            "reference": "{{item.a}}",
        }
        config = {"type": "custom", "item_schema": {"type": "object", "properties": {"a": {"type": "string"}}}}
        return ids.public(ids.EVAL, evals.create(self.session, self.user, "an eval", config, [criterion], None).id)

    def _new_eval_run(self) -> str:
        key = self.ids.get("eval") or self.fresh("eval")
        found = evals.get(self.session, self.user, ids.parse(ids.EVAL, key))
        source = sources.read(
            {"type": "jsonl", "source": {"type": "file_content", "content": [{"item": {"a": "b"}, "sample": {"output_text": "b"}}]}}
        )
        return ids.public(ids.EVAL_RUN, evals.create_run(self.session, self.user, found, "a run", source, None).id)

    def _new_job(self) -> str:
        return ids.public(ids.JOB, make_job(self.session, self.user, self.base, self.dataset).id)

    def _new_ended_job(self) -> str:
        job = make_job(self.session, self.user, self.base, self.dataset)
        job.status = "cancelled"
        return ids.public(ids.JOB, job.id)

    def _model(self, **more: Any) -> Model:
        key = uuid.uuid4()
        made = Model(
            id=key,
            owner_id=self.user.id,
            project_id=self.user.project_id,
            name=f"m{key.hex}",
            title="A model",
            kind="dialogue",
            source={"from": "folder"},
            shape=self.base.shape,
            **more,
        )
        self.session.add(made)
        self.session.flush()
        return made

    def _new_model(self) -> str:
        return ids.public(ids.MODEL, self._model(path=None).id)

    def _new_failed_model(self) -> str:
        return ids.public(ids.MODEL, self._model(path=None, status="error", error={"message": "It broke.", "hint": "Try again."}).id)

    def _new_key(self) -> str:
        return str(auth.create_key(self.session, self.user, "a key")[0].id)

    def _new_prompt(self) -> str:
        return ids.public(ids.PROMPT, prompts.create(self.session, self.user, "A prompt", prompts.read_body({}))[0].id)

    def _new_grader(self) -> str:
        grader = graders.read({"type": "length", "name": "short", "max": 9})
        return ids.public(ids.GRADER, saved_graders.create(self.session, self.user, grader).id)

    def _new_run(self) -> str:
        earlier = self.session.scalars(select(PromptRun).limit(1)).one()
        run = PromptRun(
            id=uuid.uuid4(), owner_id=self.user.id, project_id=self.user.project_id, version_id=earlier.version_id, model_id=earlier.model_id,
            dataset_id=earlier.dataset_id, spec=earlier.spec, status="queued",
        )  # fmt: skip
        self.session.add(run)
        return ids.public(ids.RUN, run.id)

    def _new_distillation(self) -> str:
        order = distillations.DistillationOrder(rows=5, answers=1, license="MIT", allows_training=True)
        return ids.public(ids.DISTILLATION, distillations.create(self.session, self.user, self.base.name, self.dataset, order).id)

    def _new_ended_distillation(self) -> str:
        key = self._new_distillation()
        self.session.get_one(DistillationRun, ids.parse(ids.DISTILLATION, key)).status = "cancelled"
        return key

    def _new_ended_run(self) -> str:
        key = self._new_run()
        self.session.get_one(PromptRun, ids.parse(ids.RUN, key)).status = "cancelled"
        return key

    def _new_evaluation(self) -> str:
        order = evaluations.read_order({"model": self.base.name, "dataset_id": self._new_dataset(), "rows": 5})
        return ids.public(ids.EVALUATION, evaluations.create(self.session, self.user, order).id)

    def _new_ended_evaluation(self) -> str:
        key = self._new_evaluation()
        evaluations.cancel(self.session, self.user, ids.parse(ids.EVALUATION, key))
        return key

    def _new_export(self) -> str:
        return ids.public(ids.EXPORT, exports.create(self.session, self.user, self.base.name, "gguf", ["F16"]).id)

    def _new_ended_export(self) -> str:
        key = self._new_export()
        exports.cancel(self.session, self.user, ids.parse(ids.EXPORT, key))
        return key

    def _new_comparison(self) -> str:
        order = {"model": self.base.name, "dataset_id": self.ids["dataset"], "strategies": ["lora", "ia3"], "name": uuid.uuid4().hex}
        return ids.public(ids.COMPARISON, comparisons.create(self.session, self.user, comparisons.read_order(order)).id)

    def _new_ended_comparison(self) -> str:
        key = self._new_comparison()
        comparisons.cancel(self.session, self.user, ids.parse(ids.COMPARISON, key))
        return key

    def _new_search(self) -> str:
        order = {"model": self.base.name, "dataset_id": self.ids["dataset"], "name": uuid.uuid4().hex}
        return ids.public(ids.SEARCH, searches.create(self.session, self.user, searches.read_order(order)).id)

    def _new_ended_search(self) -> str:
        key = self._new_search()
        searches.cancel(self.session, self.user, ids.parse(ids.SEARCH, key))
        return key

    def _new_vote(self) -> str:
        asked = [{"role": "user", "content": "What wood?"}]
        made = votes.begin(self.session, self.user, [self.base.name, self.ids["tuned_name"]], asked, Sampling())[0]
        return ids.public(ids.VOTE, made.id)

    def _new_upload(self) -> str:
        self.session.query(resumable_upload.Upload).filter(resumable_upload.Upload.file_id.is_(None)).delete()  # fifty may be open at once
        return str(resumable_upload.begin(self.session, self.user, 1000, "a.jsonl", "user_data").id)

    def _new_parted_upload(self) -> str:
        return ids.public(ids.UPLOAD, uuid.UUID(self._new_upload()))

    def _new_full_upload(self) -> str:
        """All of its bytes are in the part whose id has only zeros."""
        key = uuid.UUID(self._new_upload())
        path = resumable_upload.ticket(self.session.get_one(resumable_upload.Upload, key)).path
        path.with_name(f"{path.name}.{'0' * 32}").write_bytes(b"x" * 1000)
        return ids.public(ids.UPLOAD, key)

    def _new_permission(self) -> str:
        key = uuid.uuid4()
        job = ids.parse(ids.JOB, self.ids["job"])
        self.session.add(CheckpointPermission(id=key, job_id=job, checkpoint=self.ids["tuned_name"], project_id=key.hex))
        return f"cp_{key.hex}"

    def _new_person(self) -> str:
        made = User(id=uuid.uuid4(), name=self._new_name())
        self.session.add(made)
        return ids.public(ids.USER, made.id)

    def _new_member(self) -> str:
        key = self._new_person()
        self.session.flush()
        projects.set_member(self.session, self.project, people.get(self.session, ids.parse_user(key)), "member")
        return key

    def _new_project(self) -> str:
        return ids.public(ids.PROJECT, projects.create(self.session, self.user, self._new_name()).id)

    def _new_link(self) -> str:
        return str(projects.share(self.session, self.user, self.project)[0].id)

    def _new_invitation(self) -> str:
        return ids.public(ids.INVITATION, people.invite(self.session, self.user, "member")[0].id)

    def _new_session(self) -> str:
        made = BrowserSession(
            id=uuid.uuid4(), token_sha256=uuid.uuid4().hex, user_id=self.user.id, expires_at=func.now() + timedelta(days=1)
        )
        self.session.add(made)
        return str(made.id)

    def _new_alias(self) -> str:
        return aliases.set_(self.session, self.user, self._new_name(), self.base.name).alias.name

    def _new_gated_alias(self) -> str:
        name = self._new_alias()
        gates.apply(self.session, self.user, name, gates.AliasOrder(gate=gates.PromotionGate(dataset=self.ids["dataset"])))
        return name

    def _new_moved_alias(self) -> str:
        name = self._new_alias()
        aliases.set_(self.session, self.user, name, self.ids["tuned_name"])
        return name

    def _new_name(self) -> str:
        return f"n{uuid.uuid4().hex[:12]}"

    def prune_keys(self) -> None:
        """A page lists every key and every alias, so those that were made by the way go."""
        self.session.execute(delete(AliasMove))
        self.session.execute(delete(ModelAlias))
        for key in self.session.scalars(select(ApiKey).where(ApiKey.name == "a key")):
            self.session.delete(key)
        self.session.commit()
