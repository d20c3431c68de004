"""Learning by a reward: the same questions by a base, after worked examples, and after reinforcement, each with its pass rate."""

from __future__ import annotations

import itertools
import uuid
from typing import Any, ClassVar, NamedTuple

from sqlalchemy import select
from sqlalchemy.orm import Session

from app.datasets import samples
from app.errors import Conflict
from app.jobs.reinforcement_order import USUAL_REWARDS
from app.kit import stats
from app.kit.humanize import human_number, human_percent
from app.languages import gettext, lowered, mark
from app.learn import _visits
from app.learn._base import Need, StartedStop, Stop, StopBar, StopBars, StopButton, StopResult, StopText, Typed
from app.learn._jobs import doing, fault_of, job_of, moving, order_job, path_of, share_done
from app.ownership import mine
from app.tables import Event, Job, Model, StopVisit, User

REWARD = USUAL_REWARDS["number"]
ROWS, ANSWER_TOKENS = 24, 8
SAME_ROWS: dict[str, Any] = {
    "validation_fraction": 0.1, "graded_rows": ROWS, "evaluations_per_epoch": 0, "row_losses": False, "forgetting": False,
    "early_stopping_patience": 0, "load_best": False, "seed": 1, "epochs": 1000,
}  # fmt: skip
"""Of both runs, so that both hold out the same rows."""
EXAMPLES = SAME_ROWS | {
    "max_steps": 8, "max_tokens_per_step": 320, "samples": 0, "sample_tokens": ANSWER_TOKENS, "learning_rate": 1.5e-3,
    "chat_template": "chatml",
}  # fmt: skip
"""Three times the usual learning rate: so few steps taught nothing at that one (8.3% of 60 right before and after), and at this 36.7%. The model's
own chat template begins each of these short conversations with a system message, which would be two fifths of what is read."""
REINFORCED = SAME_ROWS | {"max_steps": 6, "max_tokens_per_step": 1024, "samples": 3}
DRAWN: dict[str, Any] = {
    "grader": REWARD, "prompts_per_step": 6, "group_size": 6, "answer_tokens": ANSWER_TOKENS, "updates_per_batch": 2, "check_prompts": 6,
}  # fmt: skip
CURVES = ("reward", "grader_right_number")
"""Names of the pass rate among the metrics of an evaluation: where it is the reward, and where it only judges."""


class PassRate(NamedTuple):
    """A share of right answers, and how many rows it is of."""

    share: float
    rows: int

    @property
    def interval(self) -> tuple[float, float]:
        return stats.wilson(self.share * self.rows, self.rows)


class RewardStop(Stop):
    name: ClassVar = "reward"
    title: ClassVar = mark("Examples, then a reward")
    place: ClassVar = 107
    idea: ClassVar = mark(
        "A model that reasons is made in steps: pre-training, worked examples, and then reinforcement, where it answers by itself and a grader "
        "says what was right. No right answer has to be written for that, only checked."
    )
    do: ClassVar = mark(
        "A model answers small sums that it has not seen: as it is, after worked examples, and after reinforcement learning from there. Each "
        "pass rate has its interval, and with so small a model and so few steps they may well overlap."
    )
    words: ClassVar = ("Reinforcement learning", "Reward", "GRPO", "Validation set")
    needs: ClassVar[tuple[Need, ...]] = ("writes",)
    samples: ClassVar = ("small-sums",)

    def buttons(self, session: Session, user: User, visit: StopVisit | None) -> list[StopButton]:
        ready = visit is not None and _tuned(session, user, visit.refs["examples"]) is not None
        return [
            StopButton("", gettext("1. Train on worked examples")),
            StopButton("reward", gettext("2. Go on with a reward"), "" if ready else gettext("as soon as the model is trained.")),
        ]

    def begin(self, session: Session, user: User, typed: Typed, visit: StopVisit | None) -> StartedStop:
        dataset = samples.add(session, user, self.samples[0])
        if typed.get("do") != "reward":
            model = _visits.take_model(session, user, "writes")
            job = order_job(session, user, self, model, dataset, {"name": "lora"}, EXAMPLES, title="examples", graders=[REWARD])
            return StartedStop({"examples": str(job.id)})
        tuned = _tuned(session, user, visit.refs["examples"]) if visit else None
        if visit is None or tuned is None:
            raise Conflict(
                gettext("There is no trained model yet."), hint=gettext("Train it on worked examples first, and wait for its end.")
            )
        asked = {"task": "reinforcement", "preference": DRAWN}
        job = order_job(session, user, self, tuned, dataset, {"name": "lora"}, REINFORCED, title="reward", **asked)
        return StartedStop({"examples": visit.refs["examples"], "reward": str(job.id)})

    def look(self, session: Session, user: User, visit: StopVisit) -> StopResult:
        steps: tuple[str, ...] = ("examples", "reward")
        jobs = {key: job_of(session, user, visit.refs[key]) for key in steps if key in visit.refs}
        if not all(jobs.values()):
            return StopResult(fault=gettext("A run was deleted."))
        found = {key: job for key, job in jobs.items() if job is not None}
        result = StopResult(
            links=[
                (gettext("The run on worked examples") if key == "examples" else gettext("The run with a reward"), path_of(job))
                for key, job in found.items()
            ]
        )
        result.fault = next(filter(None, map(fault_of, found.values())), "")
        job = list(found.values())[-1]
        if moving(job):
            by_examples = job is found["examples"]
            learning = gettext("Learning from worked examples") if by_examples else gettext("Answering, grading and learning")
            result.doing, result.progress = doing(job, learning), share_done(job)
        _show(session, found, result)
        if not result.fault and not result.doing:
            result.ended = "reward" in found
            if not result.ended:
                result.notes.append(
                    gettext("Now the second button: the model answers by itself, and a grader says which answers are right.")
                )
        return result


def _tuned(session: Session, user: User, key: str) -> Model | None:
    return session.scalar(mine(Model, user).where(Model.job_id == uuid.UUID(key), Model.status == "ready"))


def pass_rates(session: Session, job: Job) -> list[PassRate]:
    """The pass rate of each evaluation of a job, in order."""
    rows = session.scalars(select(Event.data).where(Event.job_id == job.id, Event.type == "evaluated").order_by(Event.id))
    found = {int(data["step"]): data["metrics"] for data in rows}
    held = session.scalar(
        select(Event.data["validation_rows"].as_integer()).where(Event.job_id == job.id, Event.type == "started").limit(1)
    )
    shares = [next((metrics[name] for name in CURVES if metrics.get(name) is not None), None) for _, metrics in sorted(found.items())]
    return [PassRate(float(share), min(ROWS, held or ROWS)) for share in shares if share is not None]


def _show(session: Session, jobs: dict[str, Job], result: StopResult) -> None:
    """Bars of the steps that are done, what may be said of their differences, and answers."""
    rates = {key: pass_rates(session, job) for key, job in jobs.items()}
    told = [(gettext("As it is"), rate, "examples") for rate in rates["examples"][:1]]
    for key, title in (("examples", gettext("After worked examples")), ("reward", gettext("After the reward"))):
        if key in jobs and jobs[key].status == "succeeded" and rates[key]:
            told.append((title, rates[key][-1], key))
    if not told:
        return
    best = max(rate.share for _, rate, _ in told)
    bars = [_bar(title, rate, path_of(jobs[key]), rate.share == best > 0) for title, rate, key in told]
    result.bars = [StopBars(gettext("Right answers to questions that were held out"), bars)]
    result.headline = ", ".join(f"{lowered(title)} {human_percent(rate.share, 0)}" for title, rate, _ in told)
    result.notes += [_difference(one, other) for one, other in itertools.pairwise(told)]
    if "reward" in jobs:
        result.notes += _of_check(session, jobs["reward"])
    result.texts = _answers(session, jobs["reward"]) if "reward" in jobs else []


def _bar(title: str, rate: PassRate, path: str, best: bool) -> StopBar:
    low, high = rate.interval
    value = gettext(
        "%(share)s of %(rows)s, %(low)s to %(high)s",
        share=human_percent(rate.share, 0),
        rows=rate.rows,
        low=human_percent(low, 0),
        high=human_percent(high, 0),
    )
    return StopBar(title, rate.share, value, low, high, path, best)


def _difference(one: tuple[str, PassRate, str], other: tuple[str, PassRate, str]) -> str:
    """Two steps in a sentence that calls no difference real whose intervals overlap."""
    (low, high), (other_low, other_high) = one[1].interval, other[1].interval
    values = {
        "one": one[0], "share": human_percent(one[1].share, 0), "other": lowered(other[0]), "other_share": human_percent(other[1].share, 0),
    }  # fmt: skip
    if other_low > high or other_high < low:
        return gettext("%(one)s %(share)s, %(other)s %(other_share)s: the intervals are apart, so this is more than chance.", **values)
    return gettext(
        "%(one)s %(share)s, %(other)s %(other_share)s: the intervals overlap, so it may be chance; more rows or more steps would tell.",
        **values,
    )


def _of_check(session: Session, job: Job) -> list[str]:
    """What the reward check found before the run."""
    details = session.scalar(select(Event.data["details"]).where(Event.job_id == job.id, Event.type == "started").limit(1)) or {}
    check = details.get("reward_check")
    if not check:
        return []
    return [
        gettext(
            "The check before the run: %(answers)s answers to %(questions)s questions, a mean reward of %(reward)s; on %(share)s of the questions "
            "the answers differ, and only these teach.",
            answers=check["answers"],
            questions=check["prompts"],
            reward=human_number(check["reward"], 2),
            share=human_percent(check["spread"], 0),
        )
    ]


def _answers(session: Session, job: Job) -> list[StopText]:
    """The first answers after the reward."""
    data = (
        session.scalar(select(Event.data).where(Event.job_id == job.id, Event.type == "sampled").order_by(Event.id.desc()).limit(1)) or {}
    )
    name = gettext("After the reward")
    return [
        StopText(
            f"{name}: {sample['prompt'][:80]}",
            sample["answer"],
            path=path_of(job),
            note=gettext("Reference: %(answer)s. Before: %(before)s", answer=sample["reference"], before=sample["base"]),
        )
        for sample in data.get("samples", [])[:3]
        if job.status == "succeeded"
    ]
