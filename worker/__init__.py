"""Luthier with torch: training and generation. It imports `app`; nothing imports it."""
