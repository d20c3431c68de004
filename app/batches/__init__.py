"""Batches of API requests: `/v1/batches`, as OpenAI's clients call it."""
