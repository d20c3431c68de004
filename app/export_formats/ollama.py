"""Ollama: a GGUF file per type and a Modelfile that names it, with the chat template in Go."""

from __future__ import annotations

from app.export_formats.gguf import Gguf
from app.languages import mark


class Ollama(Gguf):
    name, title, place = "ollama", "Ollama", 20
    summary = mark("A GGUF file and a Modelfile with template, stops and system prompt: then ollama create NAME -f Modelfile.")


FORMAT = Ollama()
