"""`luthier backup` and `luthier restore`.

    FOLDER/objects/ab/<sha256>      bytes, each stored once, whatever the number of backups that need them
    FOLDER/snapshots/<time>.json    one backup: its schema, its tables and its files, each with the name of its object
    FOLDER/secrets/<time>.json      the signing keys of that backup, apart, mode 0600

The rows come from one repeatable-read transaction (`rows.py`), and the files are those that these rows name (`named.py`). Files of a
studio never change under their final name, so nothing has to stop; what was deleted in between is found, and a new snapshot taken.
"""

from __future__ import annotations

from app.ops.backup.restoring import check, restore
from app.ops.backup.taking import BackupReport, take

__all__ = ["BackupReport", "check", "restore", "take"]
