"""Scores on held-out rows and on general text."""
