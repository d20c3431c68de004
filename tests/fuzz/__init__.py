"""A fuzzer of the whole web application: valid requests to every route, changed by a seeded generator, and what must hold of every
answer. `python -m tests.fuzz --seconds 600` runs it for long; `tests/security/test_fuzz.py` runs it for seconds in the suite."""
