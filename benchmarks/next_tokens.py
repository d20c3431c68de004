"""What comes next, by several models: the table of their likeliest next tokens after one text.

    python -m benchmarks.next_tokens ["The cat sat on"] [--model FOLDER[+ADAPTER]]… [--top 8] [--json FILE]

Each --model is a folder of weights, with the folder of a LoRA adapter behind a plus where there is one; without any, the
studio's starter model. The text is given to every model as it stands. The engine is the one behind `POST /v1/next_tokens`.
"""

from __future__ import annotations

import argparse
import json
import uuid
from pathlib import Path
from typing import Any

from app.generation import GenerateRequest, Sampling, Seen, SeenToken
from app.manifest import sha256_of
from app.next_tokens import probability
from app.spec import Adapter


def look(engine: Any, named: str, text: str, top: int) -> list[SeenToken]:
    """The likeliest next tokens of one model."""
    from benchmarks.prompts import reference

    folder, _, adapter = named.partition("+")
    ref = reference(Path(folder), "generic")
    if adapter:
        laid = Path(adapter).resolve()
        ref = ref.model_copy(
            update={"adapters": (Adapter(strategy="lora", path=str(laid), sha256=sha256_of(laid / "adapter_model.safetensors")),)}
        )
    request = GenerateRequest(
        id=uuid.uuid4(), owner=uuid.UUID(int=0), model=ref, prompt=text, look=top, sampling=Sampling(max_tokens=1), seed=0
    )
    for entries in engine.answer(request):
        for entry in entries:
            if isinstance(entry, Seen):
                return entry.following
            if entry.type == "error":
                raise SystemExit(entry.message)
    raise SystemExit(f"{named} gave no answer.")


def as_text(text: str, names: list[str], columns: list[list[SeenToken]]) -> str:
    """One column for each model, the likeliest token first."""
    lines = [f"after {text!r}", "  ".join(f"{name[:24]:24}" for name in names)]
    for row in zip(*columns, strict=True):
        lines.append("  ".join(f"{json.dumps(t.token, ensure_ascii=False)[:15]:15} {probability(t) or 0:7.1%} " for t in row))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="?", default="The cat sat on")
    parser.add_argument("--model", action="append", metavar="FOLDER[+ADAPTER]", help="may be given several times")
    parser.add_argument("--top", type=int, default=8)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    from benchmarks.generation import _starter
    from worker.engine import Engine
    from worker.lanes import Shelf

    models = given.model or [str(_starter())]
    engine = Engine(Shelf())
    columns = [look(engine, named, given.text, given.top) for named in models]
    engine.close()
    names = [Path(named.rpartition("+")[2]).name for named in models]
    print(as_text(given.text, names, columns))
    if given.json:
        said = [[{"token": t.token, "id": t.id, "probability": probability(t)} for t in column] for column in columns]
        given.json.write_text(json.dumps({"text": given.text, "models": dict(zip(models, said, strict=True))}, indent=1) + "\n")


if __name__ == "__main__":
    main()
