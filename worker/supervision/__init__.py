"""Processes that watch over a trainer."""
