"""Helpers without business: what any project would need."""
