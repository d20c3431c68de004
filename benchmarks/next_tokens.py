"""What comes next, by models of several kinds: the table of their likeliest next tokens after one text.

    python -m benchmarks.next_tokens ["The cat sat on"] [--model MODEL]… [--top 8] [--json FILE]

A MODEL is the name of a starter (`gemma-3-270m`), of any model of the studio on this data folder
(`ft:gemma-3-270m:…`), or a folder of weights, with the folder of a LoRA adapter behind a plus where there is one and with
its kind before it where it should not be guessed: `instruction=FOLDER+ADAPTER`. Without any, the generic starter, the
newest instruction model that was tuned here and the dialogue starter are taken, as far as they are here.

The text is given to every model as it stands, as `POST /v1/next_tokens` gives it. Models that follow or converse know
texts in their template: they have a second column, in which the text is a person's turn and what comes next is the answer.
The pair says how much of the difference between kinds is the prompt's.
"""

from __future__ import annotations

import argparse
import json
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from app.errors import StudioError
from app.inference.next_tokens import probability
from app.inference.protocol import GenerateRequest, PromptLogprobs, Sampling, SeenToken
from app.jobs.local import kind_of
from app.kit.manifest import sha256_of
from app.models import starters
from app.spec import Adapter, ModelRef

KINDS = ("generic", "instruction", "dialogue")
USUAL = ("gemma-3-270m", "smollm2-135m-instruct")


class Column(NamedTuple):
    """What one model thinks comes next, after the text as it stands or after the text as a turn of its template."""

    model: str
    kind: str
    prompt: str
    tokens: list[SeenToken]


def look(engine: Any, ref: ModelRef, top: int, **prompt: Any) -> list[SeenToken]:
    """The likeliest next tokens of one model; `prompt` is `prompt=` or `messages=`."""
    request = GenerateRequest(
        id=uuid.uuid4(), owner=uuid.UUID(int=0), model=ref, look=top, sampling=Sampling(max_tokens=1), seed=0, **prompt
    )
    for entries in engine.answer(request):
        for entry in entries:
            if isinstance(entry, PromptLogprobs):
                return entry.following
            if entry.type == "error":
                raise SystemExit(f"{ref.name}: {entry.message} {entry.hint}".strip())
    raise SystemExit(f"{ref.name} gave no answer.")


def reference(named: str) -> ModelRef:
    """The model behind a name or a folder. Exits with a sentence when there is none."""
    from benchmarks import prompts

    kind, _, rest = named.rpartition("=") if named.split("=")[0] in KINDS else ("", "", named)
    base, _, adapter = rest.partition("+")
    starter = starters.STARTERS.get(base)
    if starter and not starters.present(base):
        raise SystemExit(f"{base} is not in the data folder. Run `luthier models add {base}` first.")
    folder = starters.folder(base) if starter else Path(base)
    if not (folder / "config.json").is_file():
        return _of_studio(rest)
    ref = prompts.reference(folder, "generic")
    kind = kind or (starter.kind if starter else kind_of(folder, ref.shape))
    ref = ref.model_copy(update={"name": base if starter else folder.name, "kind": kind})
    if adapter:
        laid = Path(adapter).resolve()
        sha = sha256_of(laid / "adapter_model.safetensors")
        ref = ref.model_copy(update={"name": laid.name, "adapters": (Adapter(strategy="lora", path=str(laid), sha256=sha),)})
    return ref


def _of_studio(name: str) -> ModelRef:
    from app.cli import as_owner
    from app.models import service as models

    try:
        ref: ModelRef = as_owner(lambda session, user: models.resolve(session, user, name).ref)
        return ref
    except StudioError as error:
        raise SystemExit(f"{name}: {error.message} {error.hint}".strip()) from None


def usual() -> list[ModelRef]:
    """One model of each kind, as far as they are here; says on stderr which are missing."""
    from app.cli import as_owner
    from app.models import service as models

    found = [reference(name) for name in USUAL if starters.present(name)]
    missing = [name for name in USUAL if not starters.present(name)]
    try:
        ready = as_owner(lambda session, user: [(m.name, m.kind) for m in models.list_(session, user) if m.status == "ready"])
        tuned = next((name for name, kind in reversed(ready) if kind == "instruction"), None)
    except StudioError:
        tuned = None
    found[1:1] = [_of_studio(tuned)] if tuned else []
    missing += [] if tuned else ["an instruction model tuned here"]
    if missing:
        print(f"Left out: {', '.join(missing)}.", file=sys.stderr)
    return found


def columns_of(engine: Any, refs: Sequence[ModelRef], text: str, top: int) -> list[Column]:
    found = []
    for ref in refs:
        found.append(Column(ref.name, ref.kind, "as it stands", look(engine, ref, top, prompt=text)))
        if ref.kind != "generic":
            turn = [{"role": "user", "content": text}]
            found.append(Column(ref.name, ref.kind, "as a turn", look(engine, ref, top, messages=turn)))
    return found


def as_text(text: str, columns: Sequence[Column]) -> str:
    """One column for each model and prompt, the likeliest token first."""
    lines = [f"after {text!r}"]
    lines += ["  ".join(f"{head[:26]:26}" for head in heads) for heads in zip(*((c.model, c.kind, c.prompt) for c in columns), strict=True)]
    for row in zip(*(c.tokens for c in columns), strict=True):
        lines.append("  ".join(f"{json.dumps(t.token, ensure_ascii=False)[:17]:17} {probability(t) or 0:7.1%} " for t in row))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="?", default="The cat sat on")
    parser.add_argument("--model", action="append", metavar="MODEL", help="may be given several times")
    parser.add_argument("--top", type=int, default=8)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    from worker.inference.engine import Engine
    from worker.inference.model_pool import ModelPool

    refs = [reference(named) for named in given.model] if given.model else usual()
    if not refs:
        raise SystemExit("There is no model here. Run `make studio` first, or name a folder with --model.")
    engine = Engine(ModelPool())
    columns = columns_of(engine, refs, given.text, given.top)
    engine.close()
    print(as_text(given.text, columns))
    if given.json:
        said = [
            c._asdict() | {"tokens": [{"token": t.token, "id": t.id, "probability": probability(t)} for t in c.tokens]} for c in columns
        ]
        given.json.write_text(json.dumps({"text": given.text, "columns": said}, indent=1) + "\n")


if __name__ == "__main__":
    main()
