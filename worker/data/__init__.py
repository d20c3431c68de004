"""Rows as text, tokens and batches."""
