"""Datasets: parsed, checked, edited, split and combined."""
