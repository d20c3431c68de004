"""Scores on validation rows and on general text."""
