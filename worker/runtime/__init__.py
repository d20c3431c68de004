"""Foundations of every process with torch: device, threads, processes, progress, failures."""
