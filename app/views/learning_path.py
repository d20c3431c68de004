"""The guide's learning path: an introduction to fine-tuning, done here step by step. Links lead to prefilled forms."""

from __future__ import annotations

from typing import NamedTuple


class PathStep(NamedTuple):
    title: str
    do: str
    see: str
    links: tuple[tuple[str, str], ...]


PATH = (
    PathStep(
        "Next token",
        "Let a model continue “The cat sat on”.",
        "A language model gives each possible next token a probability. All that follows is built on this.",
        (("Predict the next token", "/playground/next-tokens"),),
    ),
    PathStep(
        "Three kinds of models",
        "Ask a base, an instruct and a chat model the same question.",
        "The base model continues the text, the instruct model answers, the chat model holds a conversation. Training made the difference.",
        (("Three kinds", "/playground/tutorial"),),
    ),
    PathStep(
        "Prompts",
        "Score zero-shot, few-shot and chain-of-thought prompts on the same rows.",
        "Prompt design changes the answers without training; prompt engineering measures which version is best. A small model gains "
        "little from a chain of thought.",
        (
            ("Zero-shot", "/playground/prompts/new?builder=zero_shot"),
            ("Few-shot", "/playground/prompts/new?builder=few_shot"),
            ("Chain-of-thought", "/playground/prompts/new?builder=chain_of_thought"),
        ),
    ),
    PathStep(
        "Feature extraction",
        "Freeze an encoder and train a classifier on its vectors. Take all-MiniLM-L6-v2 and a dataset with labels.",
        "Seconds of training, and nothing is forgotten: the model is only read.",
        (("Start a run", "/jobs/new?strategy=feature_extraction"), ("The method", "/guide/feature_extraction")),
    ),
    PathStep(
        "Dense layers on top",
        "Train new dense layers on the frozen model.",
        "More capacity than a linear classifier, for more rows.",
        (("Start a run", "/jobs/new?strategy=dense_head"), ("Last layers only", "/jobs/new?strategy=top_layers")),
    ),
    PathStep(
        "Full re-training and forgetting",
        "Train every weight, with a learning rate of 0.0003 so that it shows. Read General ability when the run has ended.",
        "The most capacity, the most memory, and the model may forget what it knew.",
        (("Start a run", "/jobs/new?strategy=full&run.learning_rate=0.0003"),),
    ),
    PathStep(
        "Adapters",
        "Add small bottleneck layers to every block and train only these.",
        "About 1% of the parameters are trained; the base model stays unchanged.",
        (("Start a run", "/jobs/new?strategy=bottleneck_adapter"),),
    ),
    PathStep(
        "Soft prompts",
        "Train vectors that come before the text: prompt tuning, prefix tuning, P-tuning.",
        "The smallest files. They learn slowly and need a higher learning rate.",
        (
            ("Prompt tuning", "/jobs/new?strategy=prompt_tuning"),
            ("Prefix tuning", "/jobs/new?strategy=prefix_tuning"),
            ("P-tuning", "/jobs/new?strategy=p_tuning"),
        ),
    ),
    PathStep(
        "LoRA and quantization",
        "Train low-rank matrices next to each layer, then look at the memory that 16, 8 and 4 bits need.",
        "Close to full fine-tuning with far fewer trainable parameters.",
        (("Start a run", "/jobs/new?strategy=lora"), ("Memory calculator", "/guide#memory")),
    ),
    PathStep(
        "Compare",
        "Run several methods on the same rows, split and seed; then with a quarter, half and all of the data.",
        "One table with scores, memory, time and forgetting. More data usually helps more than another method.",
        (("Compare methods", "/compare/new"), ("Learning curve", "/compare/new?kind=learning_curve")),
    ),
)
