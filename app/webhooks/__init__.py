"""Webhooks: the end of jobs and batches told to other programs, signed as OpenAI signs its own."""
