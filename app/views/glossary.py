"""The guide's glossary: the field's terms, each in a sentence or two."""

from __future__ import annotations

from app.languages import mark

GLOSSARY: dict[str, str] = {
    mark("Accuracy"): mark(
        "Share of rows whose predicted label is right. With uneven classes look at macro F1, which counts every class the same."
    ),
    mark("Adapter"): mark(
        "A few trainable layers or matrices added to a frozen base model. The file is small, and it can be removed again."
    ),
    mark("Base model"): mark(
        "The model that fine-tuning starts from. In a narrower sense one that was only pre-trained and continues a text."
    ),
    mark("Batch"): mark("The rows behind one step. Luthier counts a batch in tokens, because rows differ in length."),
    mark("Bits per byte"): mark(
        "Cross-entropy per byte of text. Unlike perplexity it can be compared between models with different tokenizers."
    ),
    mark("Calibration"): mark("Whether probabilities can be trusted: of the answers given with 80%, about 80% should be right."),
    mark("Chain-of-thought"): mark(
        "A prompt that asks for the reasoning before the answer, often with a worked example. It helps large models more than small ones."
    ),
    mark("Chat template"): mark("How a model's turns (system, user, assistant) are written as one text. Each chat model has its own."),
    mark("Checkpoint"): mark("A saved state of a run. It can be tried, and the run can resume from it."),
    mark("Context window"): mark("The most tokens a model reads at once."),
    mark("Distillation"): mark(
        "Training a student on what a teacher, another model, says: on its best answers, or token by token on its probabilities."
    ),
    mark("DPO"): mark("Direct preference optimization: training on pairs of a chosen and a rejected answer, without a reward model."),
    mark("Encoder"): mark("A model that turns a text into a vector, for classification and search. It generates no text."),
    mark("Embedding"): mark("A text or token as a vector. Texts with similar meaning have vectors that point the same way."),
    mark("Epoch"): mark("One pass over the training set. Three epochs show every row three times."),
    mark("Feature extraction"): mark(
        "The model is frozen and only turns texts into vectors; a small classifier is trained on these (linear probe)."
    ),
    mark("Few-shot"): mark("A prompt with a few solved examples before the question. Nothing is trained."),
    mark("Fine-tuning"): mark("Training a pre-trained model further on your own rows."),
    mark("Forgetting"): mark("What a fine-tuned model lost in general ability. Catastrophic when it can do little but the new task."),
    mark("Gradient"): mark(
        "The direction in which each trainable parameter would have to change to raise the loss; a step goes the other way."
    ),
    mark("Gradient checkpointing"): mark("Activations are recomputed in the backward pass instead of kept: less memory, slower."),
    mark("GRPO"): mark(
        "Group relative policy optimization: several answers to a prompt are scored, and each is compared with the mean of its group."
    ),
    mark("Hallucination"): mark("A fluent answer that is not true."),
    mark("Hyperparameter"): mark(
        "A setting that is chosen before training, such as the learning rate or the rank; a parameter is found by training."
    ),
    mark("KL divergence"): mark("How far a model's distribution over the next token has moved from another one's, in nats."),
    mark("KTO"): mark("Kahneman–Tversky optimization: training on single answers that are rated good or bad."),
    mark("Learning rate"): mark("The size of a step. Too high and the loss jumps or diverges; too low and nothing is learned."),
    mark("LoRA"): mark("Low-rank adaptation: a frozen weight matrix plus the product of two small trainable matrices next to it."),
    mark("Loss"): mark("What training lowers: the mean cross-entropy of the right tokens, in nats. 0 would be certain of every token."),
    mark("Merging"): mark("Adding an adapter's change into the weights, which gives an ordinary model that needs no adapter."),
    mark("Optimizer"): mark(
        "The rule that turns gradients into a step. AdamW keeps two numbers for each trainable parameter, which costs memory."
    ),
    mark("Overfitting"): mark("The model memorizes the training rows: training loss falls while validation loss rises."),
    mark("Packing"): mark("Several short rows share one sequence, so that no computation is spent on padding."),
    mark("Parameter"): mark("A number of the model. Trainable parameters are those that fine-tuning changes."),
    mark("PEFT"): mark("Parameter-efficient fine-tuning: all methods that train a small part (adapters, LoRA, soft prompts, selective)."),
    mark("Perplexity"): mark("The exponential of the loss: the average number of tokens the model chooses between. Lower is better."),
    mark("Pre-training"): mark("The first training, on a very large text, in which a model is trained to predict the next token."),
    mark("Prompt design"): mark("Finding the wording that makes a model do the task: instruction, format, examples."),
    mark("Prompt engineering"): mark(
        "Prompt design done systematically: versions of a prompt are measured on the same rows, as the prompt lab does."
    ),
    mark("Quantization"): mark(
        "Storing weights in fewer bits, such as 8 or 4 instead of 16. Less memory, a little less exact; QLoRA trains on top of it."
    ),
    mark("Rank"): mark("Width r of LoRA's two matrices. Higher has more capacity, more trainable parameters and more memory."),
    mark("Reinforcement learning"): mark(
        "Training on answers that the model draws itself: a reward makes the better ones likelier. No right answers need to be written, "
        "only checked."
    ),
    mark("Reward"): mark("The score of an answer in reinforcement learning, 0 to 1, given by a grader."),
    mark("Reward model"): mark("A model that gives an answer a number, trained on pairs of a better and a worse answer."),
    mark("ROUGE-L"): mark("How much of the reference an answer has in the same order of words, 0 to 1."),
    mark("Sampling"): mark("Drawing the next token by its probability. Temperature 0 always takes the most likely one."),
    mark("Seed"): mark("Decides every random draw; the same seed gives the same split and the same order."),
    mark("Self-consistency"): mark("Several chains of thought are sampled for one question, and the most frequent answer counts."),
    mark("Soft prompt"): mark("A prompt of trainable vectors instead of words (prompt tuning, prefix tuning, P-tuning)."),
    mark("Step"): mark("One update of the trainable parameters, from one batch. A few dozen are the least that shows an effect."),
    mark("System prompt"): mark("An instruction before the conversation that defines how the model behaves."),
    mark("Temperature"): mark("How random sampling is: 0 is deterministic, above 1 is erratic."),
    mark("Token"): mark("The unit a model reads and writes: a word or a part of one. English has about four characters per token."),
    mark("Transfer learning"): mark(
        "What a model learned in pre-training is kept and used for another task, so that little data and time suffice."
    ),
    mark("Validation set"): mark("Rows that are not trained on. They show whether the model learned the task or only the rows."),
    mark("Warmup"): mark("The first steps, in which the learning rate rises from zero."),
    mark("Zero-shot"): mark("A prompt with the question alone, without examples."),
}
