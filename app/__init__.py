"""The part of Luthier without torch: web process, relay and command line."""
