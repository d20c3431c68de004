"""Models: loading, fused layers, losses."""
