"""Runs the Python of a model card as a reader would, who has the download and the base and no Luthier."""

from __future__ import annotations

import contextlib
import io
import json
import re
from pathlib import Path
from typing import Any


def run_card(card: str, folder: Path, **bases: Path) -> dict[str, Any]:
    """The names that the code has made. `folder` is the unpacked download; other models are found in `bases` by name."""
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert not re.search(r"^(import|from) (app|worker|luthier)", code, re.MULTILINE)
    for name, place in {".": folder, **bases}.items():
        code = code.replace(json.dumps(name), json.dumps(str(place)))
    made: dict[str, Any] = {}
    with contextlib.redirect_stdout(io.StringIO()) as said:
        exec(compile(code, "README.md", "exec"), made)
    assert said.getvalue(), "it shows what the model says, even if that is nothing"
    return made
