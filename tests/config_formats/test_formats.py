"""Configurations of other programs, and what they order here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from pydantic import TypeAdapter

from app import config_formats
from app.errors import BadData
from app.jobs.request import read_objective_settings, read_order
from app.run_settings import RunSettings
from app.spec import AnyStrategy

LLAMA_FACTORY = """
model_name_or_path: Qwen/Qwen3-0.6B
trust_remote_code: true
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 16
lora_target: all
dataset: rows.jsonl
template: qwen3
cutoff_len: 2048
max_samples: 1000
output_dir: saves/qwen
logging_steps: 10
save_steps: 500
per_device_train_batch_size: 2
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
val_size: 0.1
galore_rank: 8
"""
AXOLOTL = """
base_model: mistralai/Mistral-7B-v0.3
load_in_4bit: true
datasets:
  - path: rows.jsonl
    type: alpaca
val_set_size: 0.05
adapter: qlora
sequence_len: 4096
sample_packing: true
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_linear: true
micro_batch_size: 2
gradient_accumulation_steps: 4
num_epochs: 2
optimizer: paged_adamw_8bit
lr_scheduler: cosine
learning_rate: 0.0002
train_on_inputs: false
warmup_steps: 10
flash_attention: true
special_tokens:
  pad_token: "<pad>"
wandb_project:
"""
UNSLOTH = """
model: unsloth/Qwen2.5-0.5B
data: {dataset: team/rows, format_type: auto}
training:
  training_type: lora
  max_seq_length: 2048
  load_in_4bit: true
  num_epochs: 1
  learning_rate: 0.0002
  batch_size: 2
  gradient_accumulation_steps: 4
  warmup_steps: 5
  max_steps: 0
  weight_decay: 0.01
  random_seed: 3407
  train_on_completions: true
  gradient_checkpointing: unsloth
lora: {lora_r: 64, lora_alpha: 16, lora_dropout: 0.0, target_modules: "q_proj,v_proj", use_rslora: false, finetune_vision_layers: true}
logging: {enable_wandb: true, wandb_project: mine}
"""
SOUP = """
base: meta-llama/Llama-3.2-1B-Instruct
task: dpo
data: {train: ./data/pairs.jsonl, format: dpo, val_split: 0.1, max_length: 2048}
training:
  epochs: 3
  lr: 1e-5
  batch_size: auto
  lora: {r: 64, alpha: 16, target_modules: auto}
  quantization: none
  dpo_beta: 0.2
output: ./output
"""
OPENAI = json.dumps(
    {
        "model": "gpt-6-mini",
        "training_file": "file-abc",
        "suffix": "mine",
        "seed": 3,
        "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 4, "batch_size": "auto"}}},
        "integrations": [{"type": "wandb", "wandb": {"project": "mine"}}],
    }
)
EXAMPLES = {"llama_factory": LLAMA_FACTORY, "axolotl": AXOLOTL, "unsloth": UNSLOTH, "soup": SOUP, "openai_job": OPENAI}


def order(text: str):
    return config_formats.read(text)[1].order


def noted(text: str) -> set[str]:
    return {note.key for note in config_formats.read(text)[1].notes}


def test_every_format_has_an_example():
    assert EXAMPLES.keys() == config_formats.FORMATS.keys()


@pytest.mark.parametrize("name", EXAMPLES)
def test_what_comes_of_it_is_an_order_of_a_job(name):
    found, translation = config_formats.read(EXAMPLES[name])
    assert found.name == name
    written = yaml.safe_load(config_formats.as_file(found, translation))
    assert written == translation.order
    read_order(written)
    RunSettings(**written.get("run", {}))
    if "strategy" in written:
        TypeAdapter(AnyStrategy).validate_python(written["strategy"])


def test_llama_factory():
    found = order(LLAMA_FACTORY)
    assert found["model"] == "Qwen/Qwen3-0.6B" and found["training_file"] == "rows.jsonl" and found["task"] == "generation"
    assert found["strategy"] == {"rank": 16, "layers": "all-linear", "name": "lora", "alpha": 32}
    assert found["run"] == {
        "max_length": 2048, "save_steps": 500, "batch_size": 2, "gradient_accumulation_steps": 8, "learning_rate": 1e-4, "epochs": 3.0,
        "schedule": "cosine", "warmup_fraction": 0.1, "validation_fraction": 0.1,
    }  # fmt: skip
    assert noted(LLAMA_FACTORY) == {"trust_remote_code", "max_samples", "template", "galore_rank", "packing"}


def test_axolotl_counts_packed_batches_in_tokens():
    found = order(AXOLOTL)
    assert (
        found["run"]["max_tokens_per_step"] == 8192 and "batch_size" not in found["run"] and found["run"]["optimizer"] == "paged_adamw_8bit"
    )
    assert found["strategy"] == {"rank": 32, "alpha": 16.0, "dropout": 0.05, "layers": "all-linear", "name": "qlora"}
    assert found["run"]["warmup_steps"] == 10 and found["run"]["validation_fraction"] == 0.05 and noted(AXOLOTL) == {"special_tokens"}
    plain = AXOLOTL.replace("sample_packing: true", "sample_packing: false")
    assert order(plain)["run"]["batch_size"] == 2 and "max_tokens_per_step" not in order(plain)["run"]


def test_unsloth_and_soup():
    found = order(UNSLOTH)
    assert found["strategy"] == {"rank": 64, "alpha": 16.0, "dropout": 0.0, "target_modules": "q_proj, v_proj", "name": "qlora"}
    assert "train_on" not in found["run"] and "training_file" not in found and found["run"]["seed"] == 3407
    assert order(UNSLOTH.replace("train_on_completions: true", "train_on_completions: false"))["run"]["train_on"] == "all_turns"
    assert noted(UNSLOTH) == {"data.dataset", "logging.enable_wandb"}
    found = order(SOUP)
    assert found["task"] == "preference" and found["preference"] == {"beta": 0.2, "loss": "dpo"} and found["run"]["learning_rate"] == 1e-5
    assert found["strategy"]["name"] == "lora" and "batch_size" not in found["run"] and found["training_file"] == "./data/pairs.jsonl"


@pytest.mark.parametrize(
    ("text", "task", "preference", "notes"),
    [
        (AXOLOTL + "rl: orpo\norpo_alpha: 0.2\n", "preference", {"loss": "orpo", "beta": 0.2}, set()),
        (AXOLOTL + "rl: simpo\nrl_beta: 2.5\n", "preference", {"loss": "simpo", "beta": 2.5, "gamma": 0.5}, set()),
        (AXOLOTL + "rl: kto\nkto_undesirable_weight: 0.3\n", "kto", {"desirable_weight": 1.0, "undesirable_weight": 0.3}, set()),
        (AXOLOTL + "rl: ipo\ndpo_label_smoothing: 0.1\n", "preference", {"loss": "ipo"}, {"preference.label_smoothing"}),
    ],
)
def test_losses_of_preferences(text, task, preference, notes):
    """A default of the other program that is not ours is written down."""
    found = order(text)
    assert (found["task"], found["preference"]) == (task, preference) and noted(text) == noted(AXOLOTL) | notes
    assert read_objective_settings(task, found["preference"])


def test_preferences_of_llama_factory():
    def of(**change):
        return order(yaml.safe_dump({**yaml.safe_load(LLAMA_FACTORY), **change}))

    assert of(stage="dpo", pref_loss="simpo")["preference"] == {"loss": "simpo", "beta": 0.1, "gamma": 0.5}
    assert of(stage="dpo", pref_loss="orpo", pref_beta=0.3)["preference"] == {"loss": "orpo", "beta": 0.3}
    kto = of(stage="kto", kto_chosen_weight=2.0)
    assert kto["task"] == "kto" and kto["preference"] == {"desirable_weight": 2.0, "undesirable_weight": 1.0}
    assert "preference" not in of()


def test_a_job_of_openai():
    found = order(OPENAI)
    assert found["method"] == {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 4}}} and found["seed"] == 3
    assert noted(OPENAI) == {"model", "training_file", "integrations"}


@pytest.mark.parametrize(
    ("change", "strategy"),
    [
        ({"finetuning_type": "full"}, {"name": "full"}), ({"finetuning_type": "freeze", "freeze_trainable_layers": 3}, {"name": "top_layers", "layers": 3}),
        ({"quantization_bit": 4}, {"name": "qlora"}), ({"use_dora": True}, {"name": "dora"}), ({"use_rslora": True}, {"name": "rslora"}),
        ({"pissa_init": True}, {"name": "pissa"}), ({"finetuning_type": "oft"}, {"name": "oft"}),
    ],
)  # fmt: skip
def test_methods_of_llama_factory(change, strategy):
    found = order(yaml.safe_dump({**yaml.safe_load(LLAMA_FACTORY), **change}))["strategy"]
    assert strategy.items() <= found.items()
    TypeAdapter(AnyStrategy).validate_python(found)


def test_a_setting_that_the_method_does_not_have_is_said():
    found = config_formats.read(LLAMA_FACTORY + "quantization_bit: 4\nadditional_target: lm_head\n")[1]
    assert "modules_to_save" not in found.order["strategy"] and "strategy.modules_to_save" in {note.key for note in found.notes}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (LLAMA_FACTORY.replace("stage: sft", "stage: ppo"), "'ppo'"), (AXOLOTL + "rl: grpo\n", "grpo"), ("a: 1", "of no program"),
        ("[1, 2]", "no settings"), ("a: [", "neither YAML"), (SOUP.replace("task: dpo", "task: grpo"), "'grpo'"),
        (OPENAI.replace("supervised", "magic"), "'magic'"), ("a: !!python/object/apply:os.system [id]", "neither YAML"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused(text, said):
    with pytest.raises(BadData, match=said):
        config_formats.read(text)


def test_a_value_that_is_no_number_is_noted():
    found = config_formats.read(LLAMA_FACTORY.replace("cutoff_len: 2048", "cutoff_len: long"))[1]
    assert "max_length" not in found.order["run"] and "cutoff_len" in {note.key for note in found.notes}


def test_the_command_writes_the_order_and_says_what_is_left(tmp_path: Path, monkeypatch):
    from typer.testing import CliRunner

    from app.cli import app

    monkeypatch.chdir(tmp_path)
    Path("lora.yaml").write_text(LLAMA_FACTORY)
    said = CliRunner().invoke(app, ["import", "lora.yaml"])
    assert said.exit_code == 0 and "galore_rank: has no counterpart here" in said.output.replace("\n", " "), said.output
    text = Path("job.yaml").read_text()
    assert "# galore_rank: 8: has no counterpart here" in text and yaml.safe_load(text)["strategy"]["rank"] == 16
    assert CliRunner().invoke(app, ["import", "lora.yaml"]).exit_code == 1, "it overwrites nothing"
