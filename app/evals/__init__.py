"""Evals of OpenAI's API: criteria, and runs of a model over items; `/v1/evals`, as OpenAI's clients call it."""
