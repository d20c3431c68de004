"""Public ids: a prefix that names the kind of object, and a UUID. Internally only the UUID is passed around."""

from __future__ import annotations

import uuid
from functools import partial

from app.errors import NotFound
from app.languages import gettext, mark

FILE, DATASET, JOB, EVENT, CHECKPOINT = "file", "ds", "ftjob", "ftevent", "ftckpt"
MODEL, ANSWER, EVALUATION, COMPARISON, PROMPT, VOTE = "model", "answer", "eval", "cmp", "prompt", "vote"
PREDICTION, RUN, EXPORT, GRADER, UPLOAD, PART = "pred", "run", "export", "grader", "upload", "part"
USER, INVITATION, PROJECT = "user", "invite", "proj"
BATCH, BATCH_REQUEST, WEBHOOK = "batch", "batch_req", "we"
EVAL, EVAL_RUN, EVAL_ITEM = "evalset", "evalrun", "outputitem"
CHAT_COMPLETION, RESPONSE = "chatcmpl", "resp"
ALIAS_MOVE, DISTILLATION, SEARCH = "aliasmove", "distill", "search"

_MISSING = {
    FILE: mark("No such file: %(id)s"),
    DATASET: mark("No such dataset: %(id)s"),
    JOB: mark("No such fine-tuning job: %(id)s"),
    CHECKPOINT: mark("No such checkpoint: %(id)s"),
    MODEL: mark("No such model: %(id)s"),
    COMPARISON: mark("No such comparison: %(id)s"),
    EVALUATION: mark("No such evaluation: %(id)s"),
    PREDICTION: mark("No such prediction: %(id)s"),
    EXPORT: mark("No such export: %(id)s"),
    GRADER: mark("No such grader: %(id)s"),
    USER: mark("No such person: %(id)s"),
    INVITATION: mark("No such invitation: %(id)s"),
    PROJECT: mark("No such project: %(id)s"),
    BATCH: mark("No such batch: %(id)s"),
    EVAL: mark("No such eval: %(id)s"),
    EVAL_RUN: mark("No such run of an eval: %(id)s"),
    EVAL_ITEM: mark("No such item of a run: %(id)s"),
    WEBHOOK: mark("No such webhook endpoint: %(id)s"),
    CHAT_COMPLETION: mark("No such stored chat completion: %(id)s"),
    RESPONSE: mark("No such stored response: %(id)s"),
    ALIAS_MOVE: mark("No such move of an alias: %(id)s"),
    DISTILLATION: mark("No such distillation: %(id)s"),
    SEARCH: mark("No such search: %(id)s"),
}


def public(prefix: str, key: uuid.UUID) -> str:
    """`ftjob-0f3c…`. The ids of checkpoints, projects, uploads, batches, webhook endpoints and responses are joined by an underscore, as
    in OpenAI's API."""
    return f"{prefix}{_joint(prefix)}{key.hex}"


def _joint(prefix: str) -> str:
    return "_" if prefix in (CHECKPOINT, PROJECT, UPLOAD, PART, BATCH, BATCH_REQUEST, WEBHOOK, RESPONSE) else "-"


def parse(prefix: str, text: str, *, param: str | None = None) -> uuid.UUID:
    """The UUID of a public id. Raises NotFound, because a malformed id names nothing."""
    head, _, tail = text.partition(_joint(prefix))
    try:
        if head != prefix or len(tail) != 32:
            raise ValueError
        return uuid.UUID(hex=tail)
    except ValueError:
        missing = _MISSING.get(prefix)
        message = gettext(missing, id=text[:80]) if missing else gettext("No such %(kind)s: %(id)s", kind=prefix, id=text[:80])
        raise NotFound(message, param=param) from None


parse_job = partial(parse, JOB, param="fine_tuning_job_id")
parse_comparison = partial(parse, COMPARISON, param="comparison_id")
parse_evaluation = partial(parse, EVALUATION, param="evaluation_id")
parse_grader = partial(parse, GRADER, param="grader_id")
parse_export = partial(parse, EXPORT, param="export_id")
parse_prediction = partial(parse, PREDICTION, param="prediction_id")
parse_prompt = partial(parse, PROMPT, param="prompt_id")
parse_prompt_run = partial(parse, RUN, param="run_id")
parse_user = partial(parse, USER, param="user_id")
parse_project = partial(parse, PROJECT, param="project_id")
parse_invitation = partial(parse, INVITATION, param="invite_id")
parse_vote = partial(parse, VOTE, param="vote_id")
parse_batch = partial(parse, BATCH, param="batch_id")
parse_webhook = partial(parse, WEBHOOK, param="webhook_endpoint_id")
parse_completion = partial(parse, CHAT_COMPLETION, param="completion_id")
parse_distillation = partial(parse, DISTILLATION, param="distillation_id")
parse_search = partial(parse, SEARCH, param="search_id")
parse_alias_move = partial(parse, ALIAS_MOVE, param="after")
"""`parse` for ids in the API's paths; an error names the parameter."""
