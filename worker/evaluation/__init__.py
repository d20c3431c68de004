"""Evaluations, each in a process of its own."""
