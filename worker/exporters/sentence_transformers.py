"""The folder that sentence-transformers loads: the model, and what is done with its hidden states (`worker/inference/embeddings.py`):
their mean over the text's tokens, scaled to unit length."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from app.export_formats import FORMATS
from worker.exporters._base import Exporter, ExportOptions, Progress, WrittenFile
from worker.exporters._folder import WEIGHTS, copy_others, write_weights

MODULES = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
REPLACED = ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json")


class SentenceTransformersExporter(Exporter):
    format = FORMATS["sentence_transformers"]

    def write(self, source: Path, into: Path, options: ExportOptions, progress: Progress) -> Sequence[WrittenFile]:
        """The model's own files, its weights in float32, and what the layout adds."""
        progress(0.0, "Writing the weights")
        config = json.loads((source / "config.json").read_text())
        copy_others(source, into, lambda name: name in REPLACED or WEIGHTS.fullmatch(name))
        write_weights(source, into, "F32")
        layers = [
            {"idx": i, "name": str(i), "path": folder, "type": f"sentence_transformers.models.{kind}"}
            for i, (folder, kind) in enumerate(MODULES)
        ]
        pooling = {"word_embedding_dimension": config["hidden_size"], "pooling_mode_mean_tokens": True}
        pooling |= {f"pooling_mode_{name}": False for name in ("cls_token", "max_tokens", "mean_sqrt_len_tokens")}
        _json(into / "modules.json", layers)
        _json(into / "1_Pooling" / "config.json", pooling)
        _json(into / "sentence_bert_config.json", {"max_seq_length": _longest(source, config), "do_lower_case": False})
        _json(into / "config_sentence_transformers.json", {"similarity_fn_name": "cosine"})
        (into / "2_Normalize").mkdir()
        (into / "2_Normalize" / ".gitkeep").touch()
        return [WrittenFile(p.relative_to(into).as_posix(), "F32") for p in sorted(into.rglob("*")) if p.is_file()]


EXPORTER = SentenceTransformersExporter()


def _json(path: Path, value: object) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value, indent=2))


def _longest(source: Path, config: dict) -> int:
    """Tokens that the model reads at most: the tokenizer's limit where it has one, within the table of positions."""
    path = source / "tokenizer_config.json"
    limit = json.loads(path.read_text()).get("model_max_length") if path.is_file() else None
    reserved = 2 if config["model_type"] in ("roberta", "xlm-roberta", "mpnet") else 0
    return int(min(limit or 1 << 30, config["max_position_embeddings"] - reserved))
