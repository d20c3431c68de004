"""Evaluations and prompt runs."""
