"""What the first import of torch changes for the garbage collector, and what a later one leaves alone."""

from __future__ import annotations

import gc
import subprocess
import sys

from tests.conftest import PROJECT
from worker.runtime.fast_import import importing


def test_a_process_looks_for_garbage_after_the_first_import_and_not_in_what_it_brought():
    code = (
        "import gc; from worker.runtime.fast_import import importing\n"
        "with importing(): assert not gc.isenabled()\n"
        "assert gc.isenabled() and gc.get_freeze_count() > 1000"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=PROJECT).returncode == 0


def test_where_torch_is_there_already_nothing_is_kept_from_being_collected():
    import torch  # noqa: F401

    before = gc.get_freeze_count()
    with importing():
        assert gc.isenabled()
    assert gc.get_freeze_count() == before
