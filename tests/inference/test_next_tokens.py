"""Next tokens: the engine against transformers, the API, the page, and a browser that picks one."""

from __future__ import annotations

import math

import pytest

from tests.generating import _workers, answering_dir, generate_worker, register_tiny  # noqa: F401


@pytest.fixture
def two(session):
    return [register_tiny(session, name, kind) for name, kind in (("tiny", "dialogue"), ("tiny-generic", "generic"))]


def by_transformers(folder, text):
    """ids, log-probability of each token after the first, and of all next tokens: a plain forward pass."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = tokenizer(text)["input_ids"]
    with torch.inference_mode():
        logs = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    return ids, [float(logs[i, ids[i + 1]]) for i in range(len(ids) - 1)], logs[-1]


def test_every_token_is_as_likely_as_in_a_plain_forward_pass(api, two, generate_worker, tiny_model):  # noqa: F811
    text = "The luthier glued the belly to the ribs, and waited. " * 6  # more tokens than are looked at in one step
    body = {"models": ["tiny", "tiny-generic"], "prompt": text, "top_k": 7, "prompt_tokens": True}
    answer = api.post("/v1/next_tokens", json=body)
    assert answer.status_code == 200, answer.text
    ids, logs, following = by_transformers(tiny_model, text)
    assert len(ids) > 40
    assert [one["model"] for one in answer.json()["data"]] == body["models"]
    for one in answer.json()["data"]:
        assert [t["id"] for t in one["prompt_tokens"]] == ids
        assert one["prompt_tokens"][0]["probability"] is None
        assert [t["logprob"] for t in one["prompt_tokens"][1:]] == pytest.approx(logs, abs=1e-3)
        values, best = following.topk(7)
        assert [t["id"] for t in one["tokens"]] == best.tolist()
        assert [t["probability"] for t in one["tokens"]] == pytest.approx([math.exp(v) for v in values], abs=1e-4)
    assert b"".join(bytes(t["bytes"]) for t in one["prompt_tokens"]).decode().strip() == text.strip()


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"models": []}, "models"),
        ({"prompt": ""}, "prompt"),
        ({"top_k": 0}, "top_k"),
        ({"models": ["tiny"] * 2}, "models"),
        ({"models": ["gone"]}, "model"),
    ],
)
def test_bad_requests(api, two, change, param):
    answer = api.post("/v1/next_tokens", json={"models": ["tiny"], "prompt": "a", **change})
    assert answer.status_code in (400, 404, 422) and answer.json()["error"]["param"] == param


def test_a_text_longer_than_the_window_says_so(api, two, generate_worker):  # noqa: F811
    answer = api.post("/v1/next_tokens", json={"models": ["tiny"], "prompt": "wood " * 2000})
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "context_length_exceeded"


def test_the_page_without_scripts(client, session, two, generate_worker):  # noqa: F811
    register_tiny(session, "broken", path="models/not-there")
    page = client.get("/playground/next-tokens", params={"models": ["tiny", "broken"], "text": "<b>The</b> cat sat on"})
    assert page.status_code == 200 and "<b>The" not in page.text and "is gone" in page.text
    assert page.text.count('<li class="tok">') == 10 and "bits/token" in page.text


@pytest.mark.long
def test_in_the_browser(browser_page, served, session, user, two, generate_worker, tmp_path):  # noqa: F811
    from tests.looks import look_at, sign_in

    page = sign_in(browser_page, served, session, user)
    page.goto(f"{served}/playground/next-tokens?models=tiny")
    page.locator("select[name=models]").nth(1).select_option("tiny-generic")
    page.get_by_role("button", name="Predict").click()
    page.locator(".next").nth(1).wait_for()
    first = page.locator(".next").first.locator("a").first
    token = first.inner_text()
    place = 1 + next(i for i, li in enumerate(page.locator(".next").first.locator("li").all()) if li.locator("a").count())
    page.locator("h1").click()
    page.keyboard.press(str(place))
    page.wait_for_function("document.querySelector('#text').value !== 'The cat sat on'")
    assert page.locator("#text").input_value() == "The cat sat on" + token.replace("␣", " ").replace("⏎", "\n").replace("⇥", "\t")
    likely = page.locator(".coloured").first.locator(".seen").evaluate_all("tokens => tokens.map(t => [t.className, t.title])")
    shades = {"seen s0": (50, 101), "seen s1": (20, 50), "seen s2": (5, 20), "seen s3": (1, 5), "seen s4": (0.1, 1), "seen s5": (0, 0.1)}
    assert len(likely) > 5 and likely[0] == ["seen s0", "–"]  # nothing stands before the first
    for name, told in likely[1:]:
        low, high = shades[name]
        assert low - 0.05 <= (0.05 if told.startswith("<") else float(told.removesuffix("%"))) <= high + 0.05
    page.get_by_text("As a table").click()
    look_at(page, "tokens", tmp_path)


@pytest.mark.long
def test_the_table_pairs_a_text_with_the_same_text_as_a_turn(tiny_model, data_dir, tmp_path, monkeypatch, capsys):
    """Models by kind; those that converse are looked at twice, and each column is what a plain forward pass says."""
    import json
    import sys

    from benchmarks import next_tokens

    named = ["--model", f"generic={tiny_model}", "--model", str(tiny_model), "--top", "3", "--json", str(tmp_path / "out.json")]
    monkeypatch.setattr(sys, "argv", ["next_tokens", "The belly is", *named])
    next_tokens.main()
    columns = json.loads((tmp_path / "out.json").read_text())["columns"]
    assert [(c["kind"], c["prompt"]) for c in columns] == [
        ("generic", "as it stands"), ("dialogue", "as it stands"), ("dialogue", "as a turn")
    ]  # fmt: skip
    turn = "<|im_start|>user\nThe belly is<|im_end|>\n<|im_start|>assistant\n"
    for column, text in zip(columns, ("The belly is", "The belly is", turn), strict=True):
        values, best = by_transformers(tiny_model, text)[2].topk(3)
        assert [t["id"] for t in column["tokens"]] == best.tolist()
        assert [t["probability"] for t in column["tokens"]] == pytest.approx([math.exp(v) for v in values], abs=1e-4)
    assert "as a turn" in capsys.readouterr().out
    for wrong, says in (("gemma-3-270m", "luthier models add gemma-3-270m"), ("nobody", "No such model")):
        monkeypatch.setattr(sys, "argv", ["next_tokens", "a", "--model", wrong])
        with pytest.raises(SystemExit, match=says):
            next_tokens.main()
