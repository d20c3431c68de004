"""Datasets: read, checked, edited, split and combined."""
