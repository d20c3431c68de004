"""The engine that answers."""
