"""Models: loaded, patched, their losses."""
