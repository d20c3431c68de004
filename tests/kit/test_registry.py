"""A folder as a registry."""

from __future__ import annotations

import sys

from app.kit.registry import classes_in


def test_a_file_is_found_by_being_there(tmp_path, monkeypatch):
    folder = tmp_path / "kinds"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "_base.py").write_text("from abc import ABC, abstractmethod\nclass Kind(ABC):\n    @abstractmethod\n    def run(self): ...\n")
    (folder / "b.py").write_text("from kinds._base import Kind\nclass B(Kind):\n    def run(self): return 2\n")
    (folder / "a.py").write_text(
        "from kinds._base import Kind\nfrom kinds.b import B\nclass Half(B):\n    pass\nclass Abstract(Kind):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    base = __import__("kinds._base", fromlist=["Kind"]).Kind
    try:
        # In the order of the files; what a file only imports is not its own, what is abstract is no kind, `_base` is shared.
        assert [cls.__name__ for cls in classes_in("kinds", base)] == ["Half", "B"]
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "kinds"]:
            del sys.modules[name]
