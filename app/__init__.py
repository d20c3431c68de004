"""Luthier without torch: what the web process, the relay and the command line are made of."""
