"""CPU kernels, compiled by Numba on first use."""
