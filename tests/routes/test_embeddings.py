"""`/v1/embeddings` through a real worker and the unmodified client, held against a plain forward pass."""

from __future__ import annotations

import json
import shutil

import openai
import pytest
from sqlalchemy import select

from app import limits
from app.tables import TokenUse
from tests.generating import _workers, answering_dir, generate_worker, register_tiny  # noqa: F401


@pytest.fixture
def encoder(session, answering_dir, tiny_model):  # noqa: F811
    """A small BERT beside the worker's small model, with the same tokenizer."""
    import torch
    from transformers import BertConfig, BertModel

    from app.shapes import shape_of

    folder = answering_dir / "models" / "encoder"
    if not folder.exists():
        torch.manual_seed(0)
        shutil.copytree(
            tiny_model, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json", "generation_config.json", "manifest.json")
        )
        config = BertConfig(
            vocab_size=512, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, max_position_embeddings=128
        )
        BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    model = register_tiny(session, "encoder", kind="encoder", path="models/encoder")
    model.shape = json.loads(shape_of(json.loads((folder / "config.json").read_text())).model_dump_json())
    session.commit()
    return folder


def test_vectors_are_mean_pooled_and_normalised(openai_client, encoder, generate_worker):  # noqa: F811
    import torch
    from transformers import AutoModel, AutoTokenizer

    texts = ["spruce", "A long sentence about the maple of the ribs, and of the neck too.", "spruce"]
    said = openai_client.embeddings.create(model="encoder", input=texts)
    tokenizer, model = AutoTokenizer.from_pretrained(encoder), AutoModel.from_pretrained(encoder).eval()
    for text, one in zip(texts, said.data, strict=True):
        with torch.inference_mode():
            hidden = model(**tokenizer(text, return_tensors="pt", return_token_type_ids=False)).last_hidden_state[0].mean(0)
        expected = (hidden / hidden.norm()).tolist()
        assert one.embedding == pytest.approx(expected, abs=1e-5)
        assert sum(x * x for x in one.embedding) == pytest.approx(1, abs=1e-5)
    assert [d.index for d in said.data] == [0, 1, 2] and said.usage.prompt_tokens > 20
    plain = openai_client.embeddings.create(model="encoder", input="spruce", encoding_format="float")
    assert plain.data[0].embedding == pytest.approx(said.data[0].embedding, abs=1e-6)
    openai_client.put("/model_aliases/vectors", body={"model": "encoder"}, cast_to=object)
    named = openai_client.embeddings.create(model="vectors", input="spruce")
    assert named.model == "vectors" and named.data[0].embedding == pytest.approx(plain.data[0].embedding, abs=1e-6)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"input": []}, "input"),
        ({"input": [""]}, "input"),
        ({"model": "tiny"}, "model"),
        ({"dimensions": 7}, "dimensions"),
        ({"input": "wood " * 900}, "input"),
    ],
)
def test_bad_requests(openai_client, session, encoder, generate_worker, change, param):  # noqa: F811
    register_tiny(session)
    with pytest.raises(openai.BadRequestError) as caught:
        openai_client.embeddings.create(**({"model": "encoder", "input": "a"} | change))
    assert caught.value.param == param


def test_their_tokens_count_against_the_day_and_are_refused_once_it_is_used(openai_client, session, user, encoder, generate_worker):  # noqa: F811
    said = openai_client.embeddings.create(model="encoder", input=["spruce", "maple and glue"])
    used = session.scalars(select(TokenUse)).one()
    assert (used.user_id, used.project_id, used.written) == (user.id, user.project_id, 0)
    assert used.read == used.encoded == said.usage.prompt_tokens > 2
    for by in ("person", "project"):
        assert limits.used_by(session, by, user.id, "tokens_per_day") == used.encoded
    limits.set_own(user, {"tokens_per_day": used.encoded})
    session.commit()
    with pytest.raises(openai.RateLimitError) as caught:
        openai_client.embeddings.create(model="encoder", input="spruce")
    assert caught.value.code == "limit_reached" and "tokens today" in caught.value.message
