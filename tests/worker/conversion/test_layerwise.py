"""Merging a layer at a time: the weights are those of a whole model in float32, and only a block of it is ever held so."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from app.settings import get_settings
from app.shapes import shape_of
from app.spec import Adapter, ModelRef
from app.strategies import STRATEGIES
from app.strategies._model import blocks
from tests.worker.orders import put_model
from worker.conversion import layerwise, merge
from worker.modeling import new_tokens
from worker.modeling.loading import STRATEGY_FILE, load_base, load_model, load_plain

MERGED = [name for name, cls in STRATEGIES.items() if cls.merges]


@pytest.fixture(autouse=True)
def _in_files(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights of the small model are kept in files, as those of a large one are."""
    monkeypatch.setattr(layerwise, "SMALL_BYTES", 0)


def base(folder: Path, dtype: torch.dtype | None = torch.bfloat16, **config: object) -> ModelRef:
    """The small model with biases and larger weights, in `dtype`, or with norms in float32 beside weights in bf16; in several files."""
    made = get_settings().data_dir / "models" / "tiny"
    shutil.copytree(folder, made)
    (made / "model.safetensors").unlink()
    given = json.loads((made / "config.json").read_text()) | {"attention_bias": True, "num_hidden_layers": 4} | config
    (made / "config.json").write_text(json.dumps(given))
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(AutoModelForCausalLM.from_pretrained(folder).config.from_dict(given), dtype=torch.float32)
    for weight in model.parameters():
        weight.data.add_(torch.randn_like(weight), alpha=0.05)
    model.to(dtype or torch.bfloat16).save_pretrained(made, max_shard_size="60KB")
    assert len(list(made.glob("*.safetensors"))) > 3
    if dtype is None:
        for path in made.glob("*.safetensors"):
            widened = {name: tensor.float() if "norm" in name else tensor for name, tensor in load_file(path).items()}
            save_file(widened, path, metadata={"format": "pt"})
    ref = put_model(folder)
    return ref.model_copy(update={"shape": shape_of(given)})


def tune(ref: ModelRef, name: str, settings: dict | None = None, blend: float = 1.0, words: tuple[str, ...] = ()) -> ModelRef:
    """The model with one more adapter, whose weights are drawn at random."""
    strategy, folder = STRATEGIES[name](**(settings or {})), get_settings().data_dir / f"runs/{len(ref.adapters)}"
    torch.manual_seed(len(ref.adapters))
    model = load_plain(ref)
    if words:
        tokenizer = AutoTokenizer.from_pretrained(get_settings().data_dir / ref.path)
        new_tokens.widen(model, new_tokens.add_to(tokenizer, words))
    model = strategy.attach(model)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data.add_(torch.randn_like(weight), alpha=0.02)
    folder.mkdir(parents=True)
    strategy.save(model, folder)
    if words:
        new_tokens.save(model, folder)
        tokenizer.save_pretrained(folder)
    (folder / STRATEGY_FILE).write_text(strategy.model_dump_json())
    adapter = Adapter(
        strategy=name, path=folder.relative_to(get_settings().data_dir).as_posix(), sha256=f"{len(ref.adapters)}" * 64, blend=blend
    )
    return ref.model_copy(update={"adapters": (*ref.adapters, adapter)})


def same_as_whole(ref: ModelRef, into: Path) -> None:
    """The files have each weight as peft merges it in float32, rounded once."""
    facts = merge.merge(ref, into)
    whole = load_plain(ref).to(torch.float16)
    found = {name: tensor for path in into.glob("*.safetensors") for name, tensor in load_file(path).items()}
    expected = {name: tensor for name, tensor in whole.state_dict().items() if name in found}
    tied = whole.config.tie_word_embeddings
    assert found.keys() == whole.state_dict().keys() - ({"lm_head.weight"} if tied else set())
    different = [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)]
    assert not different and facts["apart"] < 0.01
    changed = load_base(ref).to(torch.float16).state_dict()
    assert any(name not in changed or not torch.equal(found[name], changed[name]) for name in found), "the adapter changes nothing"
    assert not [path for path in into.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("name", MERGED)
def test_every_method_is_merged_to_the_bit(name: str, tiny_model: Path, tmp_path: Path) -> None:
    ref = base(tiny_model)
    assert layerwise.stored_dtype(ref) == torch.bfloat16
    same_as_whole(tune(ref, name), tmp_path / "merged")


@pytest.mark.parametrize(
    "chain",
    [
        [("lora", {}), ("dora", {}), ("lora", {"layers": "attention"})],
        [("top_layers", {}), ("lora", {})],
        [("lora", {"bias": "all", "modules_to_save": "embed_tokens"})],
        [("dora", {"bias": "lora_only"})],
    ],
    ids=str,
)
def test_adapters_on_adapters_and_weights_of_their_own(chain: list, tiny_model: Path, tmp_path: Path) -> None:
    ref = base(tiny_model)
    for name, settings in chain:
        ref = tune(ref, name, settings)
    same_as_whole(ref, tmp_path / "merged")


@pytest.mark.parametrize("name", ["dora", "layer_norm"])
def test_a_blend_is_merged_as_it_answers(name: str, tiny_model: Path, tmp_path: Path) -> None:
    same_as_whole(tune(base(tiny_model), name, blend=0.3), tmp_path / "merged")


@pytest.mark.parametrize("tied", [True, False])
def test_new_tokens_keep_their_rows(tied: bool, tiny_model: Path, tmp_path: Path) -> None:
    ref = tune(base(tiny_model, tie_word_embeddings=tied), "lora", words=("fingerboard",))
    same_as_whole(ref, tmp_path / "merged")
    assert json.loads((tmp_path / "merged/config.json").read_text())["vocab_size"] == 513


@pytest.mark.parametrize(
    ("dtype", "stored"), [(torch.float16, torch.float16), (torch.float32, torch.float32), (None, torch.float32)], ids=str
)
def test_files_of_any_dtype(dtype: torch.dtype | None, stored: torch.dtype, tiny_model: Path, tmp_path: Path) -> None:
    """Those of several dtypes are held in float32 whole."""
    ref = tune(base(tiny_model, dtype), "lora", {"layers": "attention"})
    before = {path: path.read_bytes() for path in (get_settings().data_dir / ref.path).glob("*.safetensors")}
    assert layerwise.stored_dtype(ref) == stored
    same_as_whole(ref, tmp_path / "merged")
    assert before == {path: path.read_bytes() for path in before}, "a mapped file was written to"


def test_one_block_is_held_in_float32(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the answers are computed, and while weights are merged."""
    ref, seen = tune(base(tiny_model), "lora"), []
    whole = load_model(ref)
    block = sum(weight.numel() for weight in blocks(whole.base_model.model)[0].parameters() if weight.dim() > 1)
    adapter = sum(weight.numel() for name, weight in whole.named_parameters() if "lora_" in name)
    real: dict[str, Callable] = {"before": layerwise._Widened.before, "merge": layerwise._merge_layer}
    models: list[torch.nn.Module] = []
    real_lay = layerwise.lay

    def lay(model: torch.nn.Module, given: Adapter) -> torch.nn.Module:
        models.append(real_lay(model, given))
        return models[-1]

    def count() -> None:
        seen.append(
            sum(weight.numel() for weight in models[-1].parameters() if weight.dim() > 1 and weight.dtype == torch.float32) if models else 0
        )

    def before(self, module, given):
        found = real["before"](self, module, given)
        count()
        return found

    def merge_layer(layer, keep):
        real["merge"](layer, lambda weight: count() or keep(weight))

    monkeypatch.setattr(merge, "lay", lay)
    monkeypatch.setattr(layerwise._Widened, "before", before)
    monkeypatch.setattr(layerwise, "_merge_layer", merge_layer)
    merge.merge(ref, tmp_path / "merged")
    table = whole.get_input_embeddings().weight.numel()
    assert len(seen) > 30 and block <= max(seen) <= max(block, table) + adapter < sum(w.numel() for w in whole.parameters()) / 2


def test_weights_are_mapped_not_copied(tiny_model: Path) -> None:
    """A loader that copies them would hold 2 bytes for each."""
    ref = base(tiny_model)
    model = load_base(ref, layerwise.stored_dtype(ref))
    mapped = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(".safetensors")]
    ranges = [tuple(int(end, 16) for end in line[0].split("-")) for line in mapped]
    assert ranges
    inside = [any(low <= weight.data_ptr() < high for low, high in ranges) for weight in model.parameters() if weight.dim() > 1]
    assert all(inside)


def test_a_full_disk_leaves_nothing_behind(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> torch.Tensor:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "from_file", full)
    with pytest.raises(OSError, match="No space left"):
        merge.merge(tune(base(tiny_model), "lora"), tmp_path / "merged")
    assert not list((tmp_path / "merged").iterdir())


def test_a_weight_beyond_float16_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    ref = base(tiny_model)
    path = next(p for p in (get_settings().data_dir / ref.path).glob("*.safetensors") if any("down_proj" in n for n in load_file(p)))
    tensors = load_file(path)
    tensors[next(name for name in tensors if "down_proj.weight" in name)][0, 0] = 70_000.0
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(Exception, match="does not fit into 16 bits"):
        merge.merge(tune(ref, "lora"), tmp_path / "merged")
