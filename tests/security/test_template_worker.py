"""While templates of one model go off, the real generate worker answers for another as before."""

from __future__ import annotations

import shutil
import statistics
import threading
import time

import openai
import psutil
import pytest

from tests.generating import _workers, answering_dir, generate_worker, register_tiny  # noqa: F401
from tests.security import bombs
from tests.security.bombs import MAX_SECONDS

BOOM = [{"role": "user", "content": "BOOM"}]
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def add(session, folder, name: str, bomb: str) -> None:
    if not (folder / "models" / name).exists():
        shutil.copytree(folder / "models" / "tiny", folder / "models" / name)
    (folder / "models" / name / "chat_template.jinja").write_text(bombs.guarded(bomb) + PROMPT)
    register_tiny(session, name, path=f"models/{name}")


def seconds(client, model: str, content: str = "What wood is it?") -> float:
    began = time.monotonic()
    client.chat.completions.create(model=model, messages=[{"role": "user", "content": content}], max_tokens=4)
    return time.monotonic() - began


@pytest.mark.long
def test_bombs_are_refused_and_other_models_answer_as_before(openai_client, generate_worker, session, answering_dir):  # noqa: F811
    add(session, answering_dir, "loops", bombs.GUARDED["late loops"])
    add(session, answering_dir, "doubles", bombs.GUARDED["a text times a number"])
    register_tiny(session)
    seconds(openai_client, "loops"), seconds(openai_client, "doubles"), seconds(openai_client, "tiny")
    before = [seconds(openai_client, "tiny") for _ in range(12)]
    worker = psutil.Process(generate_worker.pid)
    held = worker.memory_info().rss
    refused: list[tuple[int, str, float]] = []

    def boom(model: str) -> None:
        began = time.monotonic()
        try:
            openai_client.with_options(timeout=60, max_retries=0).chat.completions.create(model=model, messages=BOOM)
            refused.append((200, "answered", time.monotonic() - began))
        except openai.APIError as error:
            refused.append((getattr(error, "status_code", 0), str(error.code), time.monotonic() - began))

    threads = [threading.Thread(target=boom, args=[model]) for model in ("loops", "loops", "loops", "doubles")]
    for thread in threads:
        thread.start()
    during = []
    while any(thread.is_alive() for thread in threads):
        during.append(seconds(openai_client, "tiny"))
    slower = statistics.median(during) / statistics.median(before)
    print(
        f"{refused}; another model's answer {statistics.median(before):.3f} s before, {statistics.median(during):.3f} s during, at most {max(during):.3f}"
    )
    assert {status for status, _, _ in refused} <= {422, 503} and (422, "chat_template_stopped") in [one[:2] for one in refused]
    assert max(took for *_, took in refused) < 2 * MAX_SECONDS
    assert slower < 3 and max(during) < MAX_SECONDS
    assert worker.memory_info().rss - held < 200 << 20

    deadline = time.monotonic() + 10  # nothing of it goes on
    while sum(child.cpu_percent(0.2) for child in worker.children(recursive=True)) > 20:
        assert time.monotonic() < deadline


def test_a_prompt_of_megabytes_is_refused_at_once(openai_client, generate_worker, session):  # noqa: F811
    register_tiny(session)
    seconds(openai_client, "tiny")
    worker = psutil.Process(generate_worker.pid)
    held, began = worker.memory_info().rss, time.monotonic()
    with pytest.raises(openai.BadRequestError) as caught:
        seconds(openai_client, "tiny", "The belly is made of spruce. " * 200_000)
    print(f"refused after {time.monotonic() - began:.2f} s, {(worker.memory_info().rss - held) >> 20} MiB more")
    assert caught.value.code == "context_length_exceeded" and time.monotonic() - began < MAX_SECONDS
    assert worker.memory_info().rss - held < 150 << 20
