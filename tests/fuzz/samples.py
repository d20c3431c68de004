"""One valid request for every unsafe route, and the parameters that the safe ones take.

A text that begins with `$` is the id of an object of the world (`$dataset`), one with `+` a new one (`+dataset`).
"""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Sample:
    """A request to one route. `expect` are the statuses of its unchanged form; nothing else counts as honoured."""

    params: dict[str, str] = field(default_factory=dict)
    json: Any = None
    form: list[tuple[str, str]] | None = None
    multipart: list[tuple[str, str | None, bytes]] | None = None
    body: bytes | None = None
    query: list[tuple[str, str]] = field(default_factory=list)
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    expect: tuple[int, ...] = (200, 201, 204, 303)


NOTHING = Sample()
MOVED = Sample(expect=(308,))
ROW = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
TUS = [(b"tus-resumable", b"1.0.0")]
METADATA = b"filename %s,purpose %s" % (base64.b64encode(b"a.jsonl"), base64.b64encode(b"user_data"))
MESSAGES = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": [{"type": "text", "text": "What wood?"}], "name": "eva"},
]
RESPONSE_ITEMS = [
    {"role": "developer", "content": "Be short."},
    {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "What wood?"}]},
    {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
    {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"},
    {"type": "function_call_output", "call_id": "a", "output": [{"type": "input_text", "text": "ok"}]},
]
SAMPLING = {
    "n": 1, "stop": ["\n"], "seed": 7, "temperature": 0.5, "top_p": 0.9, "frequency_penalty": 0.1, "presence_penalty": 0.1, "logit_bias": {"70": 1},
    "max_tokens": 2, "top_k": 5, "min_p": 0.01, "repetition_penalty": 1.1, "stream": False,
}  # fmt: skip
JOB = {
    "model": "$model_name", "training_file": "$train_file", "suffix": "fuzz", "seed": 3, "metadata": {"a": "b"}, "name": "A job",
    "hyperparameters": {"n_epochs": 1, "batch_size": 4, "learning_rate_multiplier": 1.5}, "strategy": {"name": "lora", "rank": 4},
    "run": {"epochs": 1, "validation_fraction": 0.1}, "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2}}},
    "split": {"method": "random"}, "task": "generation",
}  # fmt: skip
PROMPT = {
    "name": "A prompt", "builder": "few_shot", "template": "{{examples}}{{input}}", "example": "{{input}} {{answer}}", "shots": 2, "choose": "chosen",
    "lines": [1, 2], "variables": {"a": "b"}, "stop": "\\n", "seed": 1, "max_tokens": 4, "samples": 1, "temperature": 0.0, "extract": "all", "score": "exact",
}  # fmt: skip
PROMPT_FORM = [
    ("name", "A prompt"), ("prompt.builder", "few_shot"), ("prompt.template", "{{examples}}{{input}}"), ("prompt.example", "{{input}}"), ("prompt.shots", "2"),
    ("prompt.choose", "chosen"), ("prompt.lines", "1, 2"), ("prompt.variables", "a = b"), ("prompt.seed", "1"), ("prompt.max_tokens", "4"), ("prompt.temperature", "0"),
]  # fmt: skip
ORDER_FORM = [
    ("model", "$model_name"), ("dataset", "$dataset"), ("strategy", "lora"), ("strategy.rank", "4"), ("run.epochs", "1"), ("run.learning_rate", "0.001"),
    ("run.max_length", "128"), ("run.seed", "1"), ("key", "+name"), ("name", "A job"), ("split.method", "random"), ("split.column", ""), ("validation", ""),
]  # fmt: skip
PLAY_FORM = [
    ("models", "$model_name"), ("prompt", "What wood?"), ("sampling.max_tokens", "2"), ("sampling.temperature", "0"), ("sampling.seed", "1"), ("sampling.stop", "a\nb"),
    ("sampling.top_k", "3"), ("sampling.system", "Be short."), ("parent", "$exchange"),
]  # fmt: skip
COMPARE = {
    "model": "$model_name", "dataset_id": "$dataset", "strategies": ["lora", {"name": "ia3"}], "kind": "strategies", "run": {"epochs": 1}, "name": "+name", "seed": 1,
    "split": {"method": "random"}, "task": "generation",
}  # fmt: skip
SEARCH = {
    "model": "$model_name", "dataset_id": "$dataset", "strategies": ["lora", {"name": "ia3"}], "run": {"max_length": 128}, "name": "+name", "seed": 1,
    "learning_rate": [1e-4, 1e-3], "rank": [4, 8], "epochs": [1, 2], "trials": 3, "minutes": 20, "split": {"method": "random", "seed": 5}, "task": "generation",
}  # fmt: skip
GRADER = {
    "type": "multi", "name": "both", "calculate_output": "0.5 * same + 0.5 * min(1, valid)",
    "graders": {
        "same": {"type": "string_check", "name": "same", "input": "{{sample.output_text}}", "operation": "ilike", "reference": "{{item.reference}}"},
        "valid": {"type": "json_schema", "name": "valid", "schema": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}},
    },
}  # fmt: skip
JUDGE = {
    "type": "label_model",
    "name": "judge",
    "model": "$model_name",
    "input": [{"role": "user", "content": "{{sample.output_text}}"}],
    "labels": ["a", "b"],
    "passing_labels": ["a"],
}
GRADER_FORM = [
    ("type", "string_check"), ("name", "Same"), ("grader.input", "{{sample.output_text}}"), ("grader.operation", "eq"), ("grader.reference", "{{item.reference}}"),
]  # fmt: skip

UNSAFE: dict[str, Sample] = {
    # accounts and settings
    "POST /sign-in": Sample(form=[("name", "nobody"), ("password", "wrong"), ("next", "/")], expect=(401, 429)),
    "POST /sign-in/code": Sample(form=[("ticket", "none"), ("code", "123456"), ("next", "/")], expect=(401,)),
    "POST /invitation/{token}": Sample({"token": "none"}, form=[("name", "Ada"), ("password", "a long password")], expect=(404,)),
    "POST /settings/account/password": Sample(form=[("current", ""), ("password", "short")], expect=(400, 401, 429)),
    "POST /settings/account/sessions/{session_id}/end": Sample({"session_id": "+session"}),
    "POST /settings/account/sign-out-everywhere": Sample(expect=(403,)),
    "POST /settings/account/two-step": NOTHING,
    "POST /settings/account/two-step/confirm": Sample(form=[("code", "123456")], expect=(401, 409, 429)),
    "POST /settings/account/two-step/off": Sample(form=[("code", "123456")]),
    "POST /settings/people/invitations": Sample(form=[("role", "member"), ("note", "Ada")]),
    "POST /settings/people/invitations/{invitation_id}/revoke": Sample({"invitation_id": "+invitation"}),
    "POST /settings/people/{user_id}/role": Sample({"user_id": "$person"}, form=[("role", "viewer")]),
    "POST /settings/people/{user_id}/disable": Sample({"user_id": "+person"}),
    "POST /settings/people/{user_id}/enable": Sample({"user_id": "$person"}),
    "POST /v1/organization/users/{user_id}": Sample({"user_id": "$person"}, json={"role": "member", "disabled": False}),
    "POST /v1/organization/invites": Sample(json={"role": "viewer", "note": "Ada", "days": 2}),
    "DELETE /v1/organization/invites/{invite_id}": Sample({"invite_id": "+invitation"}),
    "POST /admin/limits/people/{user_id}": Sample({"user_id": "$person"}, form=[("running_jobs", "3"), ("storage_bytes", "1.5")]),
    "POST /admin/limits/projects/{project_id}": Sample({"project_id": "$project"}, form=[("queued_jobs", "99"), ("weight", "2")]),
    "POST /settings/people/{user_id}/hand-over": Sample({"user_id": "+person"}, form=[("to", "$person")]),
    "POST /shared/{token}": Sample({"token": "none"}, expect=(404,)),
    "POST /project": Sample(form=[("project", "$own_project"), ("next", "/")]),
    "POST /settings/projects": Sample(form=[("name", "A project")]),
    "POST /settings/projects/{project_id}/name": Sample({"project_id": "$project"}, form=[("name", "Another name")]),
    "POST /settings/projects/{project_id}/delete": Sample({"project_id": "+project"}, form=[("contents", "delete")]),
    "POST /settings/projects/{project_id}/members": Sample({"project_id": "$project"}, form=[("name", "owner"), ("role", "admin")]),
    "POST /settings/projects/{project_id}/members/{user_id}/remove": Sample({"project_id": "$project", "user_id": "+member"}),
    "POST /settings/projects/{project_id}/links": Sample({"project_id": "$project"}, expect=(200,)),
    "POST /settings/projects/{project_id}/links/{link_id}/revoke": Sample({"project_id": "$project", "link_id": "+link"}),
    "POST /v1/organization/projects": Sample(json={"name": "A project"}),
    "POST /v1/organization/projects/{project_id}": Sample({"project_id": "$project"}, json={"name": "Another name"}),
    "POST /v1/organization/projects/{project_id}/users": Sample({"project_id": "$project"}, json={"user_id": "+person", "role": "viewer"}),
    "POST /v1/organization/projects/{project_id}/users/{user_id}": Sample({"project_id": "$project", "user_id": "+member"}, json={"role": "member"}),
    "DELETE /v1/organization/projects/{project_id}": Sample({"project_id": "+project"}),
    "DELETE /v1/organization/projects/{project_id}/users/{user_id}": Sample({"project_id": "$project", "user_id": "+member"}),
    "POST /sign-out": Sample(expect=(403,)),
    "POST /theme": Sample(form=[("theme", "dark")]),
    "POST /language": Sample(form=[("language", "de")]),
    "POST /settings/keys": Sample(form=[("name", "a key"), ("scope", "read"), ("scope", "generate"), ("days", "30")]),
    "POST /settings/keys/{key}/revoke": Sample({"key": "+key"}),
    # files and datasets
    "POST /v1/files": Sample(multipart=[("purpose", None, b"user_data"), ("expires_after[anchor]", None, b"created_at"), ("expires_after[seconds]", None, b"3600"), ("file", "a.jsonl", ROW)]),
    "DELETE /v1/files/{file_id}": Sample({"file_id": "+file"}),
    "POST /v1/tus": Sample(headers=[*TUS, (b"upload-length", b"10"), (b"upload-metadata", METADATA)], expect=(201, 409)),
    "PATCH /v1/tus/{key}": Sample({"key": "+upload"}, body=ROW, headers=[*TUS, (b"upload-offset", b"0"), (b"content-type", b"application/offset+octet-stream")]),
    "DELETE /v1/tus/{key}": Sample({"key": "+upload"}, headers=TUS),
    "POST /v1/uploads": Sample(json={"bytes": 10, "filename": "a.jsonl", "purpose": "fine-tune", "mime_type": "text/jsonl", "expires_after": {"anchor": "created_at", "seconds": 3600}}, expect=(200, 409)),
    "POST /v1/uploads/{upload_id}/parts": Sample({"upload_id": "+parted_upload"}, multipart=[("data", "part", b"x")]),
    "POST /v1/uploads/{upload_id}/complete": Sample({"upload_id": "+full_upload"}, json={"part_ids": ["part_" + "0" * 32], "md5": hashlib.md5(b"x" * 1000).hexdigest()}),
    "POST /v1/uploads/{upload_id}/cancel": Sample({"upload_id": "+parted_upload"}),
    "POST /datasets": Sample(multipart=[("name", None, b"A dataset"), ("format", None, b"chat"), ("file", "a.jsonl", ROW)]),
    "POST /datasets/paste": Sample(form=[("text", "text\tlabel\na\tb\n"), ("name", "Pasted")]),
    "POST /datasets/samples/{name}": Sample({"name": "support-replies"}),
    "POST /datasets/combine": Sample(form=[("operation", "mix"), ("use.$dataset", "on"), ("use.$other", "on"), ("weight.$dataset", "2"), ("rows", "10"), ("seed", "3"), ("name", "Joined"), ("repeat", "on")]),
    "POST /datasets/hub": Sample(form=[("repo", "a/b"), ("split", "train"), ("file", ""), ("subset", "")], expect=(503,)),
    "POST /datasets/{key}/read": Sample({"key": "+dataset"}, form=[("format", "completion"), ("map.completion.prompt", "messages"), ("map.completion.completion", "messages")]),
    "POST /datasets/{key}/retry": Sample({"key": "+dataset"}, expect=(303, 409)),
    "POST /datasets/{key}/delete": Sample({"key": "+dataset"}),
    "POST /datasets/{key}/fix": Sample({"key": "$dataset"}, form=[("finding", "$finding"), ("do", "drop"), ("rule", "")]),
    "POST /datasets/{key}/roles": Sample({"key": "$dataset"}, form=[("role.customer", "user"), ("role.agent", "")], expect=(303, 400)),
    "POST /datasets/{key}/conflicts": Sample({"key": "$dataset"}, form=[("first", "1"), ("do", "keep:1"), ("label", "a")], expect=(303, 400, 404)),
    "POST /datasets/{key}/repair": Sample({"key": "$dataset"}, expect=(400, 409, 303)),
    "POST /datasets/{key}/drop": Sample({"key": "$dataset"}, form=[("line", "1"), ("line", "2")]),
    "POST /datasets/{key}/rows/{line}": Sample({"key": "$dataset", "line": "1"}, form=[("do", "json"), ("row", ROW.decode()), ("text.messages.0.content", "x"), ("role.0", "user")]),
    "POST /datasets/{key}/split/drop": Sample({"key": "$dataset"}, form=[("method", "random"), ("column", ""), ("fraction", "0.1"), ("seed", "1"), ("validation", "")], expect=(303, 400, 409)),
    "POST /v1/datasets": Sample(json={"operation": "mix", "datasets": [{"dataset": "$dataset", "weight": 1.5}, "$other"], "rows": 10, "seed": 1, "repeat": True, "name": "Joined"}),
    "POST /v1/datasets/hub": Sample(json={"repo": "a/b", "revision": "main", "subset": "x", "split": "train", "name": "A", "format": "chat"}, expect=(503,)),
    "POST /v1/datasets/{key}/retry": Sample({"key": "+dataset"}, expect=(200, 409)),
    "POST /v1/datasets/{key}/again": Sample({"key": "+dataset"}, expect=(200, 409)),
    "DELETE /v1/datasets/{key}": Sample({"key": "+dataset"}),
    "POST /v1/datasets/{key}/fixes": Sample({"key": "$dataset"}, json={"rule": "duplicate_rows"}, expect=(200, 400)),
    "POST /v1/datasets/{key}/edits": Sample({"key": "$dataset"}, json={"line": 1, "row": {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}}),
    "POST /v1/datasets/{key}/reparse": Sample({"key": "$dataset"}, json={"format": "completion", "mapping": {"prompt": "messages", "completion": "messages"}}),
    "POST /v1/datasets/{key}/readings": Sample({"key": "$dataset"}, json={"format": "completion", "mapping": {"prompt": "messages", "completion": "messages"}}),
    # models and engines
    "POST /v1/models": Sample(json={"folder": "tiny", "name": "+name", "kind": "dialogue", "accept_terms": False}),
    "DELETE /v1/models/{model:path}": Sample({"model:path": "+model"}),
    "POST /models": Sample(form=[("starter", ""), ("folder", "tiny"), ("hub", ""), ("revision", ""), ("name", "+name"), ("kind", "dialogue"), ("next", "/models")]),
    "PUT /v1/model_aliases/{alias:path}": Sample({"alias:path": "+name"}, json={"model": "$model_name", "gate": {"dataset": "$dataset", "grader": "bits_per_byte", "max_forgetting": 0.02}, "force": True, "reason": "It is new."}),
    "POST /v1/model_aliases/{alias:path}/back": Sample({"alias:path": "+moved_alias"}, json={"reason": "It was better."}),
    "POST /v1/model_aliases/{alias:path}/evaluations": Sample({"alias:path": "+gated_alias"}, json={"model": "$tuned_name"}, expect=(200, 400, 409)),
    "POST /aliases/{alias:path}/model": Sample({"alias:path": "+gated_alias"}, form=[("model", "$tuned_name"), ("force", "true"), ("reason", "It is new.")]),
    "POST /aliases/{alias:path}/gate": Sample({"alias:path": "+alias"}, form=[("dataset", "$dataset"), ("grader", ""), ("max_forgetting", "2.5")]),
    "POST /aliases/{alias:path}/evaluations": Sample({"alias:path": "+gated_alias"}, form=[("model", "$tuned")], expect=(303, 400, 409)),
    "POST /aliases/{alias:path}/back": Sample({"alias:path": "+moved_alias"}),
    "DELETE /v1/model_aliases/{alias:path}": Sample({"alias:path": "+alias"}),
    "POST /models/{key}/aliases": Sample({"key": "$model"}, form=[("alias", "+name")]),
    "POST /models/{key}/aliases/remove": Sample({"key": "$model"}, form=[("alias", "+alias")]),
    "POST /models/{key}/delete": Sample({"key": "+model"}),
    "POST /models/{key}/retry": Sample({"key": "+failed_model"}),
    "POST /models/{key}/merge": Sample({"key": "$tuned"}, expect=(303, 400, 409)),
    "POST /models/{key}/engine": Sample({"key": "+model"}, form=[("url", "http://127.0.0.1:1/v1"), ("engine_model", "x"), ("via", "chat")], expect=(400, 403)),
    "POST /settings/account/identities": Sample(expect=(404,)),
    "POST /settings/account/identities/{identity_id}/remove": Sample({"identity_id": "00000000-0000-4000-8000-000000000001"}, expect=(404,)),
    "POST /models/hub/token": Sample(form=[("token", "hf_abcdefgh12345678")]),
    "POST /v1/engines": Sample(json={"model": "$model_name", "url": "http://127.0.0.1:1/v1", "engine_model": "x", "via": "chat"}, expect=(400, 403)),
    "POST /v1/engines/{model:path}/check": Sample({"model:path": "$model_name"}, expect=(400,)),
    "POST /models/{key}/engine/check": Sample({"key": "$model"}, expect=(400,)),
    "DELETE /v1/engines/{model:path}": Sample({"model:path": "$model_name"}, expect=(200, 409)),
    # what is named, kept and run over files
    "POST /v1/fine_tuning/jobs/{job_id}/checkpoints/{step}/keep": Sample({"job_id": "$job", "step": "4"}, expect=(404,)),
    "POST /jobs/{job_id}/checkpoints/{step}/keep": Sample({"job_id": "$job", "step": "4"}, expect=(404,)),
    "POST /models/{key}/api-key": Sample({"key": "$tuned"}, expect=(200,)),
    "POST /models/{key}/keep": Sample({"key": "$tuned"}, form=[("next", "/models")], expect=(303, 409)),
    "PATCH /v1/fine_tuning/jobs/{job_id}": Sample({"job_id": "$job"}, json={"name": "A name", "tags": ["a", "b c"]}),
    "PATCH /v1/models/{model:path}": Sample({"model:path": "$model_name"}, json={"title": "A name", "tags": ["a"]}),
    "PATCH /v1/datasets/{key}": Sample({"key": "$dataset"}, json={"name": "A name", "tags": ["a"]}),
    "PATCH /v1/comparisons/{comparison_id}": Sample({"comparison_id": "$comparison"}, json={"name": "A name"}),
    "POST /{place}/{key}/name": Sample({"place": "datasets", "key": "$dataset"}, form=[("name", "A name"), ("tags", "a, b")]),
    "POST /{place}/bulk": Sample({"place": "datasets"}, form=[("do", "tag"), ("pick", "$dataset"), ("tag", "a"), ("query", "")]),
    "POST /playground/prefer": Sample(form=[("answer", "0" * 32)], expect=(404,)),
    "POST /v1/chat/completions/{completion_id}": Sample({"completion_id": "$completion"}, json={"metadata": {"team": "b"}}),
    "POST /v1/responses": Sample(
        json={
            "model": "$model_name", "input": [*RESPONSE_ITEMS], "instructions": "Be short.", "previous_response_id": "$response", "max_output_tokens": 2,
            "text": {"format": {"type": "json_schema", "name": "a", "schema": {"type": "object"}, "strict": True}, "verbosity": "medium"},
            "tools": [], "tool_choice": "none", "parallel_tool_calls": False, "reasoning": {"effort": "none", "summary": None}, "store": True,
            "include": ["message.output_text.logprobs"], "top_logprobs": 2, "truncation": "disabled", "metadata": {"a": "b"}, "user": "u",
            "stream_options": {"include_obfuscation": False}, "stream": False, "seed": 7, "temperature": 0.5, "top_p": 0.9,
        }
    ),
    "DELETE /v1/responses/{response_id}": Sample({"response_id": "+response"}),
    "DELETE /v1/chat/completions/{completion_id}": Sample({"completion_id": "+completion"}),
    "POST /v1/datasets/stored_completions": Sample(
        json={"model": "$model_name", "metadata": {}, "created_after": 1, "created_before": 2**32, "limit": 5, "name": "Stored"}
    ),
    "POST /v1/evals": Sample(
        json={
            "name": "a",
            "data_source_config": {"type": "custom", "item_schema": {"type": "object", "properties": {"a": {"type": "string"}}}},
            "testing_criteria": [
                {"type": "string_check", "name": "right", "operation": "eq", "input": "{{sample.output_text}}", "reference": "{{item.a}}"}
            ],
        }
    ),
    "POST /v1/evals/{eval_id}": Sample({"eval_id": "$eval"}, json={"name": "A name", "metadata": {"a": "b"}}),
    "POST /v1/evals/{eval_id}/runs": Sample(
        {"eval_id": "$eval"},
        json={
            "name": "a",
            "data_source": {
                "type": "jsonl",
                "source": {"type": "file_content", "content": [{"item": {"a": "b"}, "sample": {"output_text": "b"}}]},
            },
        },
    ),
    "POST /v1/evals/{eval_id}/runs/{run_id}": Sample({"eval_id": "$eval", "run_id": "+eval_run"}),
    "POST /v1/evals/{eval_id}/runs/{run_id}/cancel": Sample({"eval_id": "$eval", "run_id": "+eval_run"}),
    "POST /evals/{eval_id}/delete": Sample({"eval_id": "+eval"}),
    "POST /evals/{eval_id}/runs/{run_id}/{action}": Sample({"eval_id": "$eval", "run_id": "+eval_run", "action": "cancel"}),
    "DELETE /v1/evals/{eval_id}": Sample({"eval_id": "+eval"}),
    "DELETE /v1/evals/{eval_id}/runs/{run_id}": Sample({"eval_id": "$eval", "run_id": "+eval_run"}),
    "POST /v1/webhook_endpoints": Sample(
        json={"name": "a", "url": "https://hooks.example.com/a", "event_types": ["batch.failed"]}, expect=(400,)
    ),
    "POST /v1/webhook_endpoints/{webhook_endpoint_id}": Sample({"webhook_endpoint_id": "$webhook"}, json={"name": "A name"}),
    "POST /v1/webhook_endpoints/{webhook_endpoint_id}/rotate_secret": Sample(
        {"webhook_endpoint_id": "$webhook"}, json={"keep_old_secret_active_for_24_hours": True}
    ),
    "POST /v1/webhook_endpoints/{webhook_endpoint_id}/test": Sample(
        {"webhook_endpoint_id": "$webhook"}, json={"event_type": "batch.failed"}, expect=(503,)
    ),
    "DELETE /v1/webhook_endpoints/{webhook_endpoint_id}": Sample({"webhook_endpoint_id": "+webhook"}),
    "POST /settings/webhooks": Sample(form=[("name", "a"), ("url", "https://hooks.example.com/a")], expect=(400,)),
    "POST /settings/webhooks/{webhook_endpoint_id}/{action}": Sample({"webhook_endpoint_id": "$webhook", "action": "rotate"}),
    "POST /v1/batches": Sample(
        json={"input_file_id": "$batch_file", "endpoint": "/v1/completions", "completion_window": "24h", "metadata": {"a": "b"}}
    ),
    "POST /v1/batches/{batch_id}/cancel": Sample({"batch_id": "+batch"}),
    "POST /playground/batches": Sample(form=[("endpoint", "/v1/completions")], expect=(400,)),
    "POST /playground/batches/{batch_id}/cancel": Sample({"batch_id": "+batch"}),
    "POST /v1/predictions": Sample(json={"model": "$model_name", "file": "$file", "column": None, "system": "x", "max_tokens": 8}),
    "POST /v1/predictions/{prediction_id}/cancel": Sample({"prediction_id": "pred-" + "0" * 32}, expect=(404,)),
    "DELETE /v1/predictions/{prediction_id}": Sample({"prediction_id": "pred-" + "0" * 32}, expect=(404,)),
    "POST /playground/batch": Sample(form=[("model", "$model_name"), ("column", ""), ("max_tokens", "8")], expect=(400,)),
    "POST /playground/batch/{prediction_id}/cancel": Sample({"prediction_id": "pred-" + "0" * 32}, expect=(404,)),
    "POST /playground/batch/{prediction_id}/delete": Sample({"prediction_id": "pred-" + "0" * 32}, expect=(404,)),
    "POST /playground/vectors": Sample(form=[("model", "$model_name"), ("dataset", "$dataset")]),
    "POST /playground/vectors/{key}/cancel": Sample({"key": "eval-" + "0" * 32}, expect=(404,)),
    # jobs
    "POST /v1/fine_tuning/jobs": Sample(json=JOB),
    "POST /v1/fine_tuning/jobs/{job_id}/trackers": Sample({"job_id": "$job"}, json={"integrations": [{"type": "tensorboard"}]}),
    "POST /jobs/{job_id}/trackers": Sample({"job_id": "$job"}, form=[("kind", "tensorboard")]),
    "POST /v1/fine_tuning/jobs/{job_id}/cancel": Sample({"job_id": "+job"}),
    "POST /v1/fine_tuning/jobs/{job_id}/pause": Sample({"job_id": "+job"}),
    "POST /v1/fine_tuning/jobs/{job_id}/resume": Sample({"job_id": "+job"}, expect=(200, 409)),
    "POST /v1/fine_tuning/checkpoints/{checkpoint:path}/permissions": Sample({"checkpoint:path": "$tuned_name"}, json={"project_ids": ["$project", "$own_project"]}),
    "DELETE /v1/fine_tuning/checkpoints/{checkpoint:path}/permissions/{permission_id}": Sample({"checkpoint:path": "$tuned_name", "permission_id": "+permission"}),
    "POST /v1/estimates": Sample(json=JOB),
    "POST /v1/advice": Sample(json={"model": "$model_name", "dataset_id": "$dataset", "measure": False, "run": {"epochs": 1}}),
    "POST /jobs": Sample(form=ORDER_FORM),
    "POST /jobs/advice": Sample(form=[("model", "$model_name"), ("dataset", "$dataset")]),
    "POST /jobs/{job_id}/pause": Sample({"job_id": "+job"}),
    "POST /jobs/{job_id}/resume": Sample({"job_id": "+job"}, expect=(303, 409)),
    "POST /jobs/{job_id}/stop": Sample({"job_id": "+job"}),
    "POST /jobs/{job_id}/save": Sample({"job_id": "+job"}, expect=(303, 409)),
    "POST /jobs/{job_id}/retry": Sample({"job_id": "$job"}, expect=(400,)),
    "POST /jobs/{job_id}/delete": Sample({"job_id": "+ended_job"}),
    "POST /v1/comparisons": Sample(json=COMPARE),
    "POST /v1/comparisons/plan": Sample(json=COMPARE),
    "POST /v1/comparisons/{comparison_id}/cancel": Sample({"comparison_id": "+comparison"}),
    "DELETE /v1/comparisons/{comparison_id}": Sample({"comparison_id": "+ended_comparison"}),
    "POST /compare": Sample(form=[("model", "$model_name"), ("dataset", "$dataset"), ("strategy", "lora"), ("strategy", "ia3"), ("run.epochs", "1"), ("key", "+name"), ("kind", "strategies"), ("shown", "strategies"), ("name", "+name")]),
    "POST /compare/{comparison_id}/keep": Sample({"comparison_id": "$comparison"}, form=[("job", "ftjob-" + "0" * 32)], expect=(404,)),
    "POST /compare/{comparison_id}/cancel": Sample({"comparison_id": "+comparison"}),
    "POST /compare/{comparison_id}/delete": Sample({"comparison_id": "+ended_comparison"}),
    "POST /v1/evaluations": Sample(json={"model": "$model_name", "dataset_id": "$dataset", "kind": "scores", "rows": 5, "part": "all", "validation_fraction": 0.2, "max_length": 64, "answers": 1, "answer_tokens": 2, "forgetting": False, "seed": 1, "graders": ["$grader", {"type": "length", "name": "Of this request", "max": 9}]}),
    "POST /v1/evaluations/{evaluation_id}/cancel": Sample({"evaluation_id": "+evaluation"}),
    "DELETE /v1/evaluations/{evaluation_id}": Sample({"evaluation_id": "+ended_evaluation"}),
    "POST /evaluations": Sample(form=[("model", "$model_name"), ("dataset", "$dataset"), ("kind", "scores"), ("rows", "5"), ("part", "all"), ("grader", "$grader"), ("next", "")]),
    "POST /evaluations/{evaluation_id}/cancel": Sample({"evaluation_id": "+evaluation"}, form=[("next", "/jobs/ftjob-a")]),
    "POST /evaluations/{evaluation_id}/delete": Sample({"evaluation_id": "+ended_evaluation"}),
    "POST /v1/models/{model:path}/exports": Sample({"model:path": "$model_name"}, json={"format": "gguf", "types": ["F16"], "system": ""}),
    "POST /v1/exports/{export_id}/cancel": Sample({"export_id": "+export"}),
    "POST /v1/exports/{export_id}/push": Sample({"export_id": "$export"}, json={"repo": "lab/tiny", "private": True, "token": "hf_token"}, expect=(409, 503)),
    "DELETE /v1/exports/{export_id}": Sample({"export_id": "+ended_export"}),
    "POST /models/{key}/exports": Sample({"key": "$model"}, form=[("format", "gguf"), ("types", "F16"), ("system", "")]),
    "POST /exports/{export_id}/cancel": Sample({"export_id": "+export"}),
    "POST /exports/{export_id}/push": Sample({"export_id": "$export"}, form=[("repo", "lab/tiny"), ("token", "hf_token"), ("public", "")], expect=(409, 503)),
    "POST /exports/{export_id}/delete": Sample({"export_id": "+ended_export"}),
    # graders
    "POST /v1/fine_tuning/alpha/graders/run": Sample(json={"grader": GRADER, "model_sample": "{\"a\": 1}", "item": {"reference": "b", "n": 2}}),
    "POST /v1/fine_tuning/alpha/graders/validate": Sample(json={"grader": GRADER}),
    "POST /v1/graders": Sample(json={"grader": GRADER}),
    "POST /v1/graders/compare": Sample(json={"grader": JUDGE, "rows": [{"item": {"a": "b"}, "first": "Spruce.", "second": "Maple."}]}, expect=(200, 503)),
    "POST /graders": Sample(form=GRADER_FORM),
    "POST /graders/try": Sample(form=[*GRADER_FORM, ("dataset", "$dataset"), ("do", "grade"), ("answer.1", "Spruce."), ("label.1", "good")]),
    "POST /graders/{grader_id}/delete": Sample({"grader_id": "+grader"}),
    "PATCH /v1/graders/{grader_id}": Sample({"grader_id": "$grader"}, json={"grader": GRADER}),
    "DELETE /v1/graders/{grader_id}": Sample({"grader_id": "+grader"}),
    # the playground
    "POST /v1/chat/completions": Sample(json={"model": "$model_name", "messages": MESSAGES, "logprobs": True, "top_logprobs": 2, "max_completion_tokens": 2, "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}, "strict": True}}, "tools": [], "tool_choice": "none", "parallel_tool_calls": False, "reasoning_effort": "none", "metadata": {"a": "b"}, "store": True, "user": "u", "stream_options": {"include_usage": True}, **SAMPLING}),
    "POST /v1/completions": Sample(json={"model": "$model_name", "prompt": "What wood?", "logprobs": 1, "echo": True, "best_of": 1, "suffix": None, **SAMPLING}),
    "POST /v1/embeddings": Sample(json={"model": "$model_name", "input": ["a"], "encoding_format": "float", "dimensions": 64}, expect=(400,)),
    "POST /v1/classify": Sample(json={"model": "$model_name", "input": ["a", "b"]}, expect=(400,)),
    "POST /v1/next_tokens": Sample(json={"models": ["$model_name"], "prompt": "What wood", "top_k": 3, "prompt_tokens": True}),
    "POST /playground": Sample(form=PLAY_FORM),
    "POST /playground/stream": Sample(form=PLAY_FORM),
    "POST /playground/{exchange_id:uuid}/save": Sample({"exchange_id:uuid": "$exchange"}, form=[("title", "Saved")]),
    "POST /learn/{stop}": Sample({"stop": "next-token"}, form=[("text", "What wood"), ("do", "")]),
    "POST /playground/tutorial/instruction": Sample(expect=(303, 400, 404, 409)),
    "POST /playground/tutorial/dialogue": Sample(expect=(303, 400, 404, 409)),
    "POST /v1/votes": Sample(json={"models": ["a", "b"], "messages": MESSAGES, "answers": ["x", "y"], "choice": 1, "edited": "z"}),
    "POST /v1/votes/dataset": Sample(json={"kind": "preference"}),
    "POST /playground/arena": Sample(form=[("prompt", "What wood?"), ("models", "$model_name"), ("models", "$model_name@1"), ("dataset", ""), ("max_tokens", "2")], expect=(303, 400, 404)),
    "POST /playground/arena/{vote_id}": Sample({"vote_id": "+vote"}, form=[("choice", "1"), ("edited", "better")]),
    "POST /playground/arena-dataset": Sample(form=[("kind", "preference")]),
    # searches
    "POST /v1/searches": Sample(json=SEARCH),
    "POST /v1/searches/plan": Sample(json=SEARCH),
    "PATCH /v1/searches/{search_id}": Sample({"search_id": "$search"}, json={"name": "A name"}),
    "POST /v1/searches/{search_id}/cancel": Sample({"search_id": "+search"}),
    "DELETE /v1/searches/{search_id}": Sample({"search_id": "+ended_search"}),
    "POST /searches": Sample(form=[("model", "$model_name"), ("dataset", "$dataset"), ("strategy", "lora"), ("strategy", "ia3"), ("trials", "3"), ("minutes", "20"), ("learning_rate", "0.0001, 0.001"), ("rank", "4, 8"), ("epochs", "1, 2"), ("key", "+name"), ("shown", "yes"), ("name", "+name")]),
    "POST /searches/{search_id}/cancel": Sample({"search_id": "+search"}),
    "POST /searches/{search_id}/delete": Sample({"search_id": "+ended_search"}),
    # distillations
    "POST /v1/distillations": Sample(json={"model": "$model_name", "dataset_id": "$dataset", "rows": 5, "answers": 2, "grader": {"type": "length", "name": "short", "max": 9}, "threshold": 0.5, "temperature": 0.8, "max_tokens": 16, "system": "Be brief.", "seed": 1, "name": "Kept", "license": "MIT", "allows_training": True}),
    "POST /v1/distillations/{distillation_id}/cancel": Sample({"distillation_id": "+distillation"}),
    "POST /v1/distillations/{distillation_id}/resume": Sample({"distillation_id": "+ended_distillation"}),
    "DELETE /v1/distillations/{distillation_id}": Sample({"distillation_id": "+ended_distillation"}),
    "POST /distillations": Sample(form=[("model", "$model_name"), ("dataset", "$dataset"), ("grader", "similar"), ("order.rows", "5"), ("order.license", "MIT"), ("allows_training", "on")]),
    "POST /distillations/{distillation_id}/{action}": Sample({"distillation_id": "+distillation", "action": "cancel"}),
    # prompts
    "POST /v1/prompts": Sample(json=PROMPT),
    "POST /v1/prompts/{prompt_id}": Sample({"prompt_id": "$prompt"}, json={k: v for k, v in PROMPT.items() if k != "name"}),
    "DELETE /v1/prompts/{prompt_id}": Sample({"prompt_id": "+prompt"}),
    "POST /v1/prompts/{prompt_id}/runs": Sample({"prompt_id": "$prompt"}, json={"model": "$model_name", "dataset_id": "$dataset", "version": 1, "part": "validation", "rows": 5, "validation_fraction": 0.2, "split_seed": 1, "beside": ["$model_name"]}),
    "POST /v1/prompts/runs/{run_id}/cancel": Sample({"run_id": "+run"}),
    "POST /jobs/new/file": Sample(multipart=[("file", "job.yaml", b"model: tiny\nstrategy: {name: lora, rank: 4}\n")]),
    "POST /playground/prompts": Sample(form=PROMPT_FORM),
    "POST /playground/prompts/{prompt_id}/delete": Sample({"prompt_id": "+prompt"}),
    "POST /playground/prompts/preview": Sample(form=PROMPT_FORM),
    "POST /playground/prompts/try": Sample(form=[*PROMPT_FORM, ("models", "$model_name"), ("dataset", "$dataset")]),
    "POST /playground/prompts/runs": Sample(form=[("models", "$model_name"), ("prompts", "$prompt:1"), ("dataset", "$dataset"), ("part", "validation"), ("rows", "5")]),
    "POST /playground/prompts/runs/{run_id}/{action}": Sample({"run_id": "+run", "action": "cancel"}),
}  # fmt: skip

SAFE: dict[str, Sample] = {
    "GET /sign-in/{token}": Sample({"token": "none"}, expect=(303, 404)),
    "GET /invitation/{token}": Sample({"token": "none"}, expect=(404,)),
    "GET /shared/{token}": Sample({"token": "none"}, expect=(404,)),
    "GET /settings/projects/{project_id}": Sample({"project_id": "$project"}),
    "GET /v1/organization/projects/{project_id}": Sample({"project_id": "$project"}),
    "GET /v1/organization/projects/{project_id}/contents": Sample({"project_id": "$project"}),
    "GET /v1/organization/projects/{project_id}/users": Sample({"project_id": "$project"}),
    "GET /v1/organization/projects/{project_id}/users/{user_id}": Sample({"project_id": "$project", "user_id": "+member"}),
    "GET /v1/organization/users/{user_id}": Sample({"user_id": "$person"}),
    "GET /v1/organization/invites/{invite_id}": Sample({"invite_id": "$invitation"}),
    "GET /oidc/begin": Sample(expect=(404,)),
    "GET /oidc/callback": Sample(query=[("code", "a"), ("state", "b")], expect=(403,)),
    "GET /v1/hub/models": Sample(query=[("search", "lab"), ("limit", "3")], expect=(503,)),
    "GET /v1/tus/{key}": NOTHING,
    "GET /jobs/compare": Sample(query=[("job", "$job")], expect=(400,)),
    "GET /playground/vectors/{key}": Sample({"key": "eval-" + "0" * 32}, expect=(404,)),
    "GET /playground/batch/{prediction_id}/download": Sample({"prediction_id": "pred-" + "0" * 32}, expect=(404,)),
    "GET /v1/exports/{export_id}": Sample({"export_id": "$export"}),
    "GET /v1/exports/{export_id}/files/{name:path}": Sample({"export_id": "$export", "name:path": "a.gguf"}, expect=(409,)),
    "GET /v1/evals/{eval_id}": Sample({"eval_id": "$eval"}),
    "GET /evals/{eval_id}": Sample({"eval_id": "$eval"}),
    "GET /v1/evals/{eval_id}/runs": Sample({"eval_id": "$eval"}),
    "GET /v1/evals/{eval_id}/runs/{run_id}": Sample({"eval_id": "$eval", "run_id": "$eval_run"}),
    "GET /v1/evals/{eval_id}/runs/{run_id}/output_items": Sample({"eval_id": "$eval", "run_id": "$eval_run"}),
    "GET /v1/evals/{eval_id}/runs/{run_id}/output_items/{output_item_id}": Sample(
        {"eval_id": "$eval", "run_id": "$eval_run", "output_item_id": "outputitem-" + "0" * 32}, expect=(404,)
    ),
    "GET /v1/webhook_endpoints/{webhook_endpoint_id}": Sample({"webhook_endpoint_id": "$webhook"}),
    "GET /v1/batches/{batch_id}": Sample({"batch_id": "$batch"}),
    "GET /playground/batches/{batch_id}/{which}": Sample({"batch_id": "$batch", "which": "output"}, expect=(200, 404)),
    "GET /v1/predictions/{prediction_id}": Sample({"prediction_id": "pred-" + "0" * 32}, expect=(404,)),
    "GET /v1/predictions/{prediction_id}/content": Sample({"prediction_id": "pred-" + "0" * 32}, expect=(404,)),
    "GET /jobs/{job_id}/checkpoints/{step}/download": Sample({"job_id": "$job", "step": "4"}, expect=(404,)),
    "GET /v1/fine_tuning/checkpoints/{checkpoint:path}/permissions": Sample({"checkpoint:path": "$tuned_name"}),
    "GET /models/terms/{name}": Sample({"name": "none"}, query=[("next", "/models")], expect=(404,)),
    "GET /models/{key}/download": Sample({"key": "$model"}),
    "GET /learn/{stop}": Sample({"stop": "next-token"}),
    "GET /guide/{strategy}": Sample({"strategy": "lora"}),
    "GET /datasets/{key}/findings.{kind}": Sample({"key": "$dataset", "kind": "csv"}),
    "GET /datasets/{key}/conflicts": Sample({"key": "$dataset"}, query=[("page", "1"), ("line", "1")]),
    "GET /v1/datasets/{key}/lines/{line}": Sample({"key": "$dataset", "line": "1"}),
    "GET /datasets/{key}/rows/{line}": Sample({"key": "$dataset", "line": "1"}),
    "HEAD /v1/tus/{key}": Sample({"key": "+upload"}, headers=TUS),
    "GET /playground/next-tokens": Sample(query=[("models", "$model_name"), ("text", "What wood"), ("top_k", "3")]),
    "GET /playground/classify": Sample(query=[("models", "$model_name"), ("text", "What wood")], expect=(400,)),
    "GET /datasets/{key}/rows": Sample({"key": "$dataset"}, query=[("model", "$model_name"), ("cutoff", "64"), ("search", "wood"), ("page", "1"), ("sort", "longest")]),
    "GET /jobs/new/file": Sample(query=ORDER_FORM),
    "GET /jobs/new": Sample(query=[*ORDER_FORM, ("clone", "$job")]),
    "GET /searches/new": Sample(query=[("model", "$model_name"), ("dataset", "$dataset"), ("strategy", "lora"), ("trials", "4"), ("rank", "2, 4"), ("shown", "yes")]),
    "GET /compare/new": Sample(query=[("model", "$model_name"), ("dataset", "$dataset"), ("strategy", "lora")]),
    "GET /static": Sample(expect=(404, 401, 405)),
    **{f"GET {path}": MOVED for path in ("/playground/ab", "/playground/lab", "/playground/kinds", "/playground/tokens", "/datasets/join", "/standby")},
    "GET /playground/ab/{vote_id}": Sample({"vote_id": "$vote"}, expect=(308,)),
    "GET /playground/lab/{rest:path}": Sample({"rest:path": "new"}, expect=(308,)),
    "GET /playground/lab/prompts/{rest:path}": Sample({"rest:path": "$prompt"}, expect=(308,)),
}  # fmt: skip
"""Safe routes whose parameters do not follow from their names; the others are made from their signatures."""

NAMES = {
    "file_id": "$file", "job_id": "$job", "comparison_id": "$comparison", "evaluation_id": "$evaluation", "prompt_id": "$prompt", "run_id": "$run", "vote_id": "$vote",
    "grader_id": "$grader", "completion_id": "$completion", "response_id": "$response", "exchange_id:uuid": "$exchange", "model:path": "$model_name",
    "alias:path": "+moved_alias", "distillation_id": "$distillation", "search_id": "$search",
}  # fmt: skip
"""What a parameter of a path names, wherever it stands."""

KEYS = (("/datasets/", "$dataset"), ("/v1/datasets/", "$dataset"), ("/models/", "$model"))
"""What `{key}` names below a path."""
