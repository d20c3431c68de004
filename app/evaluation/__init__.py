"""Evaluations, comparisons, advice and verdicts."""
