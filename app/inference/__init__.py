"""Inference on the web side: the protocol with the worker, external servers, the playground."""
