"""Estimates of what a job costs, and checks of whether it can run, before it starts. Pure."""
