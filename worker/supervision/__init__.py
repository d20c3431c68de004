"""Supervision of trainers: attempts, watchdog, exit codes, confinement."""
