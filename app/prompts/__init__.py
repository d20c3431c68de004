"""Saved prompts and their runs over datasets."""
