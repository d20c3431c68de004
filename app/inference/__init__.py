"""Answers of models: the protocol with the worker, external servers, the playground."""
