"""Converts model files from one layout to another."""
