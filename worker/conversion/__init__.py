"""Model files from one layout into another."""
