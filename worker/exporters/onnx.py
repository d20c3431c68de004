"""An encoder or a classifier as an ONNX file by torch's own exporter, compared with the model in onnxruntime.

    model.onnx        input_ids (batch, sequence), attention_mask (batch, sequence)
                      → sentence_embedding (batch, hidden), of length 1; for a classifier probabilities (batch, labels)

The tokenizer's files lie beside it. `config.json` of a classifier names its labels in order, as `id2label`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from app.errors import BadData, Unsupported
from app.export_formats import FORMATS
from worker.exporters._base import Exporter, ExportOptions, Progress, WrittenFile, completed
from worker.exporters._folder import WEIGHTS, copy_others

FILE = "model.onnx"
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
FARTHEST = 1e-4
"""How far a value may be from the model's: both compute in float32, in another order."""
TEXTS = (
    "The cat sat on the mat.",
    "An invoice was charged twice, and nobody has answered since Monday; please have a look at it.",
    "Grüße aus Köln!",
    "x",
)
"""Of several lengths, so that padding and the mask are in play."""


class OnnxExporter(Exporter):
    format = FORMATS["onnx"]
    program = "onnxruntime"

    def write(self, source: Path, into: Path, options: ExportOptions, progress: Progress) -> Sequence[WrittenFile]:
        """Raises Unsupported for a model that torch cannot trace, BadData when the file computes something else."""
        if missing := [name for name in PACKAGES if find_spec(name) is None]:
            raise Unsupported(f"{', '.join(missing)} is not installed with this worker.", hint="Install `luthier[onnx]` there.")
        import torch
        from transformers import AutoTokenizer

        progress(0.0, "Tracing the model")
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=False)
        tokenizer.padding_side = "right"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        module, labels = network(source)
        batch = tokenizer(list(TEXTS), padding=True, return_tensors="pt")
        given = (batch["input_ids"], batch["attention_mask"])
        with torch.inference_mode():
            expected = module(*given)
        copy_others(source, into, lambda name: WEIGHTS.fullmatch(name) or name.startswith("classifier"))
        if labels:
            name_labels(into / "config.json", labels)
        with completed(into / FILE) as part:
            trace(module, given, part, "probabilities" if labels else "sentence_embedding")
        progress(0.8, "Comparing it in onnxruntime")
        far = distance(into / FILE, given, expected)
        if not far <= FARTHEST:
            raise BadData(f"The file computes something else: {far:.2g} away from the model.", hint="Report this.")
        note = f"Compared in onnxruntime on {len(TEXTS)} texts: no value is farther than {far:.1g} from the model's."
        names = sorted(path.name for path in into.iterdir() if path.is_file())
        return [WrittenFile(name, "F32", (note,) if name == FILE else ()) for name in names]


EXPORTER = OnnxExporter()


def network(source: Path) -> tuple[Any, list[str]]:
    """What the file computes, as a module of (ids, mask), and the labels of a classifier."""
    import torch
    from transformers import AutoModel

    from worker.modeling.classifier import ABOUT_FILE, HEAD_FILE

    backbone = AutoModel.from_pretrained(
        source, dtype=torch.float32, attn_implementation="eager", use_safetensors=True, local_files_only=True, trust_remote_code=False
    ).eval()
    backbone.config.use_cache = False
    if not (source / HEAD_FILE).is_file():
        return _Network(backbone, None, "mean", 0, True), []
    from safetensors.torch import load_file

    from worker.modeling.loading import load_strategy

    about = json.loads((source / ABOUT_FILE).read_text(encoding="utf-8"))
    head = load_strategy(source).head(backbone.config.hidden_size, len(about["labels"]))
    head.load_state_dict(load_file(source / HEAD_FILE))
    return _Network(backbone, head.float().eval(), about["pooling"], about["skip"], about["normalise"]), about["labels"]


def _Network(backbone: Any, head: Any, pooling: str, skip: int, unit: bool) -> Any:  # a class that needs torch
    """The padded form of `worker.modeling.classifier.Classifier` and of `worker.inference.embeddings`."""
    import torch

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.head = backbone, head

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            states = self.backbone(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            if pooling == "mean":
                mask = attention_mask.unsqueeze(-1).to(states.dtype)
                vectors = (states[:, skip:] * mask[:, skip:]).sum(1) / mask[:, skip:].sum(1)
            else:
                at = attention_mask.sum(1) - 1 if pooling == "last" else torch.full_like(attention_mask[:, 0], skip)
                vectors = states.gather(1, at.view(-1, 1, 1).expand(-1, 1, states.shape[-1])).squeeze(1)
            if unit:
                vectors = torch.nn.functional.normalize(vectors, dim=-1)
            return vectors if self.head is None else self.head(vectors).softmax(-1)

    return Network().eval()


def trace(module: Any, given: tuple[Any, Any], path: Path, output: str) -> None:
    """Write the file, for batches and texts of any size. Raises Unsupported for what torch's exporter cannot follow."""
    import torch

    names, sizes = ("input_ids", "attention_mask"), {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}
    try:
        torch.onnx.export(
            module, given, str(path), input_names=list(names), output_names=[output], dynamic_shapes=dict.fromkeys(names, sizes),
            dynamo=True, external_data=False, verbose=False,
        )  # fmt: skip
    except Exception as error:  # of torch.export or onnxscript, which have no class in common
        raise Unsupported(
            f"torch cannot write this architecture as ONNX: {type(error).__name__}: {str(error)[:200]}", hint="Export it as safetensors."
        ) from error


def distance(path: Path, given: tuple[Any, Any], expected: Any) -> float:
    """The largest difference between what the file and the module compute, and between the file's answers to one text alone and padded."""
    import numpy as np
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    ids, mask = (one.numpy() for one in given)
    (found,) = session.run(None, {"input_ids": ids, "attention_mask": mask})
    short = int(mask.sum(1).argmin())
    length = int(mask[short].sum())
    (alone,) = session.run(None, {"input_ids": ids[short : short + 1, :length], "attention_mask": mask[short : short + 1, :length]})
    return float(max(np.abs(found - expected.numpy()).max(), np.abs(alone[0] - found[short]).max()))


def name_labels(path: Path, labels: Sequence[str]) -> None:
    config = json.loads(path.read_text())
    config |= {"id2label": {str(i): label for i, label in enumerate(labels)}, "label2id": {label: i for i, label in enumerate(labels)}}
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False, sort_keys=True) + "\n")
