"""Nothing is taken and ignored: each field of the newest client's requests is honored, or refused with an error that names it.

A table has a decision for every field. `honored` holds a value and the test that shows what it does; `refused` a value and the 400 that
names the field, where others may be harmless because they ask for what is done anyway.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import httpx
import pytest
from openai.types import completion_create_params, embedding_create_params, file_create_params
from openai.types.chat import chat_completion_stream_options_param
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.fine_tuning import dpo_hyperparameters_param, job_create_params, supervised_hyperparameters_param
from openai.types.responses import response_create_params, response_text_config_param
from openai.types.shared_params import reasoning

from app.jobs.request import Hyperparameters, JobRequest
from app.kit import ids
from app.routes.embeddings import EmbeddingsBody
from app.schemas.chat import ChatBody, CompletionBody, ObfuscationOptions, StreamOptions
from app.schemas.files import CreateFile
from app.schemas.responses import ReasoningConfig, ResponseBody, TextConfig
from tests.conftest import PROJECT
from tests.factories import make_dataset

CHAT, SAMPLING, TOOLS = "tests/routes/test_chat.py", "tests/worker/inference/test_sampling.py", "tests/routes/test_tools.py"
STORED, RESPONSES = "tests/routes/test_stored_completions.py", "tests/routes/test_responses.py"
JOBS, SERVICE, HERE = "tests/routes/test_fine_tuning.py", "tests/jobs/test_service.py", "tests/routes/test_every_field.py"
FUNCTION = {"type": "function", "function": {"name": "f"}}


class Honored(NamedTuple):
    """A value that is taken, and the test that shows what it does."""

    value: Any
    test: str


class Refused(NamedTuple):
    """A value that gets a 400 naming the field, and those that ask for what is done anyway."""

    value: Any
    harmless: tuple[Any, ...] = ()


LABEL = f"{TOOLS}::test_labels_are_kept_with_the_answer"
ECHO = f"{CHAT}::test_an_echo_has_the_prompts_tokens_where_they_stand"
BOTH = {
    "frequency_penalty": Honored(0.5, f"{SAMPLING}::test_penalties"),
    "logit_bias": Honored({"7": 3}, f"{SAMPLING}::test_penalties"),
    "max_tokens": Honored(5, f"{CHAT}::test_whole_answer"),
    "model": Honored("none", f"{CHAT}::test_unknown_model_and_model_that_does_not_write"),
    "n": Honored(2, f"{CHAT}::test_seed_n_and_logprobs"),
    "presence_penalty": Honored(0.5, f"{SAMPLING}::test_penalties"),
    "seed": Honored(7, f"{CHAT}::test_seed_n_and_logprobs"),
    "stop": Honored(["x"], f"{CHAT}::test_stop_strings_are_not_shown"),
    "stream": Honored(False, f"{CHAT}::test_stream_is_the_whole_answer_in_parts"),
    "stream_options": Honored({"include_usage": True}, f"{CHAT}::test_stream_is_the_whole_answer_in_parts"),
    "temperature": Honored(0.5, f"{SAMPLING}::test_draws_follow_the_distribution"),
    "top_p": Honored(0.5, f"{SAMPLING}::test_top_k_top_p_and_min_p_keep_what_they_say"),
    "user": Honored("me", LABEL),
}
DECISIONS: dict[str, dict[str, Honored | Refused]] = {
    "chat/completions": BOTH
    | {
        "audio": Refused({"voice": "alloy", "format": "wav"}),
        "function_call": Refused({"name": "f"}, ("auto", "none")),
        "functions": Refused([{"name": "f"}], ([],)),
        "logprobs": Honored(True, f"{CHAT}::test_seed_n_and_logprobs"),
        "max_completion_tokens": Honored(5, f"{TOOLS}::test_a_free_answer_is_content_and_log_probabilities_are_complete"),
        "messages": Honored([{"role": "user", "content": "x"}], f"{CHAT}::test_whole_answer"),
        "metadata": Honored({"team": "a"}, LABEL),
        "modalities": Refused(["text", "audio"], (["text"],)),
        "moderation": Refused({"model": "m"}),
        "parallel_tool_calls": Honored(False, f"{TOOLS}::test_an_agent_of_three_turns_calls_gets_results_and_answers"),
        "prediction": Refused({"type": "content", "content": "x"}),
        "prompt_cache_key": Honored("a", "tests/worker/inference/test_engine.py::test_a_conversation_goes_on_from_the_cache"),
        "prompt_cache_options": Refused({"mode": "explicit"}, ({"mode": "implicit"},)),
        "prompt_cache_retention": Refused("24h", ("in_memory",)),
        "reasoning_effort": Honored("none", f"{TOOLS}::test_thinking_is_told_from_the_answer"),
        "response_format": Honored({"type": "text"}, f"{CHAT}::test_an_answer_follows_the_schema_of_a_class_whole_and_streamed"),
        "safety_identifier": Honored("a", LABEL),
        "service_tier": Refused("flex", ("auto", "default")),
        "store": Honored(True, f"{STORED}::test_what_is_stored_is_retrieved_as_it_was_answered"),
        "tool_choice": Honored("auto", f"{TOOLS}::test_an_agent_of_three_turns_calls_gets_results_and_answers"),
        "tools": Honored([FUNCTION], f"{TOOLS}::test_an_agent_of_three_turns_calls_gets_results_and_answers"),
        "top_logprobs": Refused(2),  # without logprobs; with it, test_seed_n_and_logprobs
        "verbosity": Refused("low", ("medium",)),
        "web_search_options": Refused({}),
    },
    "completions": BOTH
    | {
        "best_of": Refused(3, (1,)),
        "echo": Honored(True, ECHO),
        "logprobs": Honored(2, ECHO),
        "prompt": Honored("x", f"{CHAT}::test_completions_continue_text_and_take_tokens_and_lists"),
        "suffix": Refused("the end", ("",)),
    },
    "responses": {name: BOTH[name] for name in ("stream", "temperature", "top_p")}
    | {
        "access_programs": Refused({"cyber": "standard"}),
        "background": Refused(True, (False,)),
        "background_options": Refused({"completion_window": "2h"}),
        "context_management": Refused([{"type": "compaction"}], ([],)),
        "conversation": Refused("conv_1"),
        "image": Refused({"context_compression": "auto"}),
        "include": Refused(["reasoning.encrypted_content"], (["message.output_text.logprobs"], [])),
        "input": Honored([{"role": "user", "content": "x"}], f"{RESPONSES}::test_a_conversation_goes_on_from_a_response"),
        "instructions": Honored("x", f"{RESPONSES}::test_a_response_says_what_a_chat_completion_says"),
        "max_output_tokens": Honored(5, f"{RESPONSES}::test_a_response_says_what_a_chat_completion_says"),
        "max_tool_calls": Refused(3),
        "metadata": Honored({"team": "a"}, f"{RESPONSES}::test_a_response_says_what_a_chat_completion_says"),
        "model": Honored("none", f"{RESPONSES}::test_a_response_says_what_a_chat_completion_says"),
        "moderation": Refused({"model": "m"}),
        "parallel_tool_calls": Honored(False, f"{RESPONSES}::test_an_agent_of_two_turns_calls_gets_a_result_and_answers"),
        "previous_response_id": Honored("resp_" + "0" * 32, f"{RESPONSES}::test_a_conversation_goes_on_from_a_response"),
        "prompt": Refused({"id": "pmpt_1"}),
        "prompt_cache_key": Honored("a", "tests/worker/inference/test_engine.py::test_a_conversation_goes_on_from_the_cache"),
        "prompt_cache_options": Refused({"mode": "explicit"}, ({"mode": "implicit"},)),
        "prompt_cache_retention": Refused("24h", ("in_memory",)),
        "reasoning": Honored({"effort": "none"}, f"{RESPONSES}::test_reasoning_is_an_item_and_is_switched_off"),
        "safety_identifier": Honored("a", f"{RESPONSES}::test_a_response_says_what_a_chat_completion_says"),
        "service_tier": Refused("flex", ("auto", "default")),
        "store": Honored(False, f"{RESPONSES}::test_a_conversation_goes_on_from_a_response"),
        "stream_options": Honored({"include_obfuscation": False}, f"{HERE}::test_nested_fields_have_a_decision_too"),
        "text": Honored({"format": {"type": "text"}}, f"{RESPONSES}::test_events_are_the_whole_response_in_parts"),
        "tool_choice": Honored("auto", f"{RESPONSES}::test_an_agent_of_two_turns_calls_gets_a_result_and_answers"),
        "tools": Honored([{"type": "function", "name": "f"}], f"{RESPONSES}::test_an_agent_of_two_turns_calls_gets_a_result_and_answers"),
        "top_logprobs": Refused(2),  # without include; with it, test_log_probabilities_are_included_where_they_are_asked_for
        "truncation": Refused("auto", ("disabled",)),
        "user": Honored("me", f"{RESPONSES}::test_a_response_says_what_a_chat_completion_says"),
    },
    "embeddings": {
        "dimensions": Honored(3, "tests/routes/test_embeddings.py::test_bad_requests"),
        "encoding_format": Honored("base64", "tests/routes/test_embeddings.py::test_vectors_are_mean_pooled_and_normalised"),
        "input": Refused([[1, 2], [3]], ("x", ["x", "y"])),
        "model": Honored("none", "tests/routes/test_embeddings.py::test_bad_requests"),
        "user": Honored("me", f"{HERE}::test_every_field_has_a_decision"),  # a name asks for nothing
    },
    "fine_tuning/jobs": {
        "hyperparameters": Honored({"n_epochs": 1}, f"{JOBS}::test_the_deprecated_form_and_auto_everywhere"),
        "integrations": Honored([{"type": "tensorboard"}], "tests/tracking/test_sending.py::test_an_order_names_trackers_and_the_job_says_how_it_goes"),
        "metadata": Honored({"team": "a"}, f"{JOBS}::test_lists_turn_pages_and_filter_by_metadata"),
        "method": Honored({"type": "supervised"}, "tests/jobs/test_reinforcement_order.py::test_the_clients_words_are_ours"),
        "model": Honored("none", f"{JOBS}::test_create_answers_with_openais_fields_and_ours"),
        "seed": Honored(7, f"{JOBS}::test_create_answers_with_openais_fields_and_ours"),
        "suffix": Honored("mine", f"{JOBS}::test_create_answers_with_openais_fields_and_ours"),
        "training_file": Honored("file-x", f"{JOBS}::test_create_answers_with_openais_fields_and_ours"),
        "validation_file": Honored("file-x", f"{SERVICE}::test_openai_settings_become_ours"),
    },
    "files": {
        "expires_after": Honored({"anchor": "created_at", "seconds": 3600}, f"{HERE}::test_a_file_expires_when_it_is_asked_to"),
        "file": Honored(b"{}", "tests/routes/test_files.py::test_the_openai_client_creates_lists_reads_and_deletes"),
        "purpose": Honored("batch", "tests/routes/test_files.py::test_the_openai_client_creates_lists_reads_and_deletes"),
    },
}  # fmt: skip
CLIENTS = {
    "chat/completions": (chat_create_params.CompletionCreateParamsNonStreaming, chat_create_params.CompletionCreateParamsStreaming),
    "completions": (completion_create_params.CompletionCreateParamsNonStreaming, completion_create_params.CompletionCreateParamsStreaming),
    "responses": (response_create_params.ResponseCreateParamsNonStreaming, response_create_params.ResponseCreateParamsStreaming),
    "embeddings": (embedding_create_params.EmbeddingCreateParams,),
    "fine_tuning/jobs": (job_create_params.JobCreateParams,),
    "files": (file_create_params.FileCreateParams,),
}
BODIES = {"chat/completions": ChatBody, "completions": CompletionBody, "responses": ResponseBody, "embeddings": EmbeddingsBody, "fine_tuning/jobs": JobRequest, "files": CreateFile}  # fmt: skip
LEAST = {
    "chat/completions": {"model": "none", "messages": [{"role": "user", "content": "x"}]},
    "completions": {"model": "none", "prompt": "x"},
    "responses": {"model": "none", "input": "x"},
    "embeddings": {"model": "none", "input": "x"},
    "fine_tuning/jobs": {"model": "none", "training_file": "file-x"},
}


def cases(kind: type) -> list[Any]:
    return [
        pytest.param(path, name, decision, id=f"{path}:{name}")
        for path, table in DECISIONS.items()
        for name, decision in table.items()
        if isinstance(decision, kind) and path in LEAST
    ]


@pytest.mark.parametrize("path", DECISIONS)
def test_every_field_has_a_decision(path):
    """Also one that a newer client has; and a body takes no field of the client's by ignoring it."""
    fields = {name for params in CLIENTS[path] for name in params.__annotations__}
    assert fields == set(DECISIONS[path]) and len(fields) >= 3
    body = BODIES[path]
    known = set(body.model_fields) | {name.partition("_after_")[0] + "_after" for name in body.model_fields if "_after_" in name}
    assert fields <= known | set(getattr(body, "refused", ()))


@pytest.mark.parametrize("path", DECISIONS)
def test_what_is_honored_is_shown_by_a_test(path):
    for name, decision in DECISIONS[path].items():
        if isinstance(decision, Honored):
            file, test = decision.test.split("::")
            assert re.search(rf"^def {test}\(", (PROJECT / file).read_text(), re.MULTILINE), f"{name}: {decision.test}"


@pytest.mark.parametrize(("path", "name", "decision"), cases(Refused))
def test_what_is_not_honored_is_refused_by_name(api, tiny_registered, order, path, name, decision):
    least = LEAST[path] | {"model": "tiny"} | (order if path == "fine_tuning/jobs" else {})
    refused = api.post(f"/v1/{path}", json=least | {name: decision.value})
    error = refused.json()["error"]
    assert refused.status_code == 400 and error["param"].split(".")[0] == name and error["message"], refused.text


@pytest.mark.parametrize(("path", "name", "decision"), cases(Honored) + cases(Refused))
def test_what_is_honored_passes(api, path, name, decision):
    """No model of this name is there, which is found out only after the body was taken."""
    for value in [decision.value] if isinstance(decision, Honored) else [*decision.harmless, None]:
        answer = api.post(f"/v1/{path}", json=LEAST[path] | ({} if value is None else {name: value}))
        assert answer.status_code == 404, answer.text


@pytest.fixture
def order(session, user, data_dir, tiny_registered):
    return {"training_file": ids.public(ids.FILE, make_dataset(session, user, data_dir).file_id)}


def test_nested_fields_have_a_decision_too(api):
    assert set(chat_completion_stream_options_param.ChatCompletionStreamOptionsParam.__annotations__) == set(StreamOptions.model_fields)
    padded = api.post("/v1/chat/completions", json=LEAST["chat/completions"] | {"stream": True, "stream_options": {"include_obfuscation": True}})  # fmt: skip
    assert padded.status_code == 400 and padded.json()["error"]["param"] == "stream_options.include_obfuscation"
    assert set(response_create_params.StreamOptions.__annotations__) == set(ObfuscationOptions.model_fields)
    assert set(reasoning.Reasoning.__annotations__) == set(ReasoningConfig.model_fields)
    assert set(response_text_config_param.ResponseTextConfigParam.__annotations__) == set(TextConfig.model_fields)
    for params in (
        dpo_hyperparameters_param.DpoHyperparametersParam,
        supervised_hyperparameters_param.SupervisedHyperparametersParam,
        job_create_params.Hyperparameters,
    ):
        assert set(params.__annotations__) <= set(Hyperparameters.model_fields)


def test_a_file_expires_when_it_is_asked_to(openai_client):
    file = openai_client.files.create(
        file=("a.jsonl", b"{}"), purpose="batch", expires_after={"anchor": "created_at", "seconds": 3600}
    )  # fmt: skip
    assert file.expires_at == file.created_at + 3600


def test_the_client_sends_what_it_says(openai_client):
    """The table's fields are those that go over the wire."""
    sent: dict[str, Any] = {}

    def keep(request: httpx.Request) -> None:
        import json

        sent.update(json.loads(request.read()))
        raise httpx.ConnectError("enough")

    client = openai_client.with_options(http_client=httpx.Client(event_hooks={"request": [keep]}), max_retries=0)
    values = {name: one.value for name, one in DECISIONS["chat/completions"].items() if isinstance(one, Honored)}
    with pytest.raises(Exception, match="Connection error"):
        client.chat.completions.create(**values)
    assert set(sent) == set(values)
