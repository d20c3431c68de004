"""Hand-written kernels for the CPU (Numba, AMX) and the GPU (Triton, fp8)."""
