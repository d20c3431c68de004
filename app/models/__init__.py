"""Models: registered, imported, checked, named."""
