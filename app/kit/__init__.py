"""Helpers without business logic, such as any project would need."""
