"""An alias with a gate, on real models: `python -m benchmarks.alias_gate [--model FOLDER] [--picture FILE.png]`.

`prod` points to the starter that writes. Two runs learn invented clinical notes: LoRA, and all weights at a high learning rate, which learns
the notes as well and forgets general text. Each is offered to the alias by the API as a release script would: the gate starts its evaluations on
notes that neither has seen, and moves the alias only to a model that is better there beyond the interval and forgets at most `--bound`. Then
`prod` answers a question through the openai client. `--picture` takes the alias's page as it refuses. Exit code 1 unless the one is refused
for its forgetting and the other moves in.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.comparison import folder_of, read, take
from benchmarks.servers import PROJECT, STARTER, Studio, studio

NOTES = PROJECT / "samples" / "clinical-notes.txt"
HELD_OUT = 16
COMMON = {
    "max_steps": 12, "max_tokens_per_step": 320, "epochs": 100, "validation_fraction": 0.0, "samples": 0, "row_losses": False, "forgetting": False,
}  # fmt: skip
RUNS: dict[str, dict[str, Any]] = {
    "forgetful": {"strategy": {"name": "full"}, "run": {**COMMON, "learning_rate": 1e-3}},
    "careful": {"strategy": {"name": "lora"}, "run": {**COMMON, "learning_rate": 1e-3}},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of the starter; the studio's own data folder when left out")
    parser.add_argument("--bound", type=float, default=0.03, help="most further bits on general text, as a share (default 0.03)")
    parser.add_argument("--picture", type=Path, help="take pictures of the page that refuses; names of the others end in theme and width")
    given = parser.parse_args()
    with studio(given.model or folder_of(STARTER)) as here:
        moved = offered(here, given.bound, given.picture)
    sys.exit(0 if moved == ["careful"] else 1)


def offered(here: Studio, bound: float, picture: Path | None) -> list[str]:
    """The runs whose models moved in."""
    from openai import ConflictError, OpenAI

    moved = []
    with OpenAI(base_url=f"{here.url}/v1", api_key=here.key) as client:
        notes = [note for note in NOTES.read_text().split("\n\n") if note.strip()]
        learned, held_out = (uploaded(client, name, part) for name, part in (("notes", notes[HELD_OUT:]), ("unseen", notes[:HELD_OUT])))
        gate = {"dataset": held_out["dataset"], "max_forgetting": bound}
        client.put("/model_aliases/prod", body={"model": STARTER, "gate": gate}, cast_to=object)
        for name, order in RUNS.items():
            body = {"model": STARTER, "training_file": learned["file"], "suffix": name, **order}
            job: Any = ended(client, "/fine_tuning/jobs", client.post("/fine_tuning/jobs", body=body, cast_to=object))
            model = job["fine_tuned_model"]
            began: Any = client.post("/model_aliases/prod/evaluations", body={"model": model}, cast_to=object)
            for evaluation in began["data"]:
                ended(client, "/evaluations", evaluation)
            try:
                client.put("/model_aliases/prod", body={"model": model, "reason": name}, cast_to=object)
                moved.append(name)
                print(f"{name}: prod points to {model}", flush=True)
            except ConflictError as error:
                print(f"{name}: refused ({error.code}): {error.body['message']}", flush=True)  # type: ignore[index, call-overload]
                if picture:
                    take(here, f"/aliases/prod?model={model}", picture)
        asked = [{"role": "user", "content": "Write a short clinical note about a cough."}]
        answer: Any = client.chat.completions.create(model="prod", messages=asked, max_tokens=40, temperature=0)  # type: ignore[call-overload]
        print(f"model='prod' answers: {answer.choices[0].message.content!r}", flush=True)
        history: Any = client.get("/model_aliases/prod/moves", cast_to=object)
        for move in reversed(history["data"]):
            print(f"  {move['from']} → {move['to']} ({move['how']}) {move['reason'] or ''} {move['result'] or ''}", flush=True)
    return moved


def uploaded(client: Any, name: str, notes: list[str]) -> dict[str, str]:
    """The ids of a file with these notes and of its dataset, once it has been read."""
    file = client.files.create(file=(f"{name}.txt", "\n\n".join(notes).encode()), purpose="fine-tune")
    return {"file": file.id, "dataset": read(client, file.id)["dataset"]}


def ended(client: Any, path: str, found: Any) -> Any:
    """A job or an evaluation once it has succeeded."""
    while found["status"] in ("queued", "running", "validating_files"):
        time.sleep(1)
        found = client.get(f"{path}/{found['id']}", cast_to=object)
    if found["status"] != "succeeded":
        raise SystemExit(f"{found['id']} {found['status']}: {found.get('error')}")
    return found


if __name__ == "__main__":
    main()
