"""The generation engine: scheduling, KV cache, sampling, adapters."""
