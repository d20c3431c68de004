"""Faults that no other folder tries: `docs/reliability.md` has the table of all of them, with their tests."""
