"""The child of `app/trackers/wandb.py`: `python -m app.trackers._wandb_child ORDER ANSWER`, both JSON files."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> None:
    import wandb

    order = json.loads(Path(sys.argv[1]).read_text())
    settings = wandb.Settings(silent=True, console="off", disable_git=True, save_code=False, x_disable_stats=True, x_disable_meta=True)
    run = wandb.init(settings=settings, **order["init"])
    final: dict[str, object] = {}
    for log in order["logs"]:
        ending = {tag: value for tag, value in log["values"].items() if tag.startswith("final/")}
        final |= ending
        if drawn := {tag: value for tag, value in log["values"].items() if tag not in ending}:
            run.log({**drawn, "_timestamp": log["at"]}, step=log["step"])
    run.summary.update(final | order["summary"])
    url = run.url
    run.finish(exit_code=order["exit_code"])
    Path(sys.argv[2]).write_text(json.dumps({"url": url}))


if __name__ == "__main__":
    main()
