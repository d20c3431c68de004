"""An adapter's own folder, as peft saved it, with the public name of its base in place of the studio's path."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from app.errors import BadData
from app.export_formats import FORMATS
from worker.exporters._base import Exporter, ExportOptions, Progress, WrittenFile
from worker.exporters._folder import copy_others

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class AdapterExporter(Exporter):
    format = FORMATS["adapter"]

    def write(self, source: Path, into: Path, options: ExportOptions, progress: Progress) -> Sequence[WrittenFile]:
        """Copy the folder. Raises BadData where it is not in peft's layout."""
        progress(0.0, "Copying the adapter")
        if missing := [name for name in (CONFIG, WEIGHTS) if not (source / name).is_file()]:
            raise BadData(f"The adapter has no {missing[0]}.", hint="Fine-tune again.")
        copy_others(source, into)
        config = json.loads((source / CONFIG).read_text())
        (into / CONFIG).write_text(json.dumps({**config, "base_model_name_or_path": options.base or None}, indent=2, sort_keys=True) + "\n")
        return [WrittenFile(path.name, "PEFT") for path in sorted(into.iterdir())]


EXPORTER = AdapterExporter()
