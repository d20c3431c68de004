"""Checks of a job's settings and data before it is created: what is refused, and what a person is warned about.

Everything is read off the datasets' reports, so it costs no pass over the rows. What is refused would fail in the trainer minutes
later; what is warned about trains, but may not be what was meant.
"""

from __future__ import annotations

from typing import Any

from app import formats
from app.errors import BadField
from app.formats._base import shown
from app.machines.hardware import Machine
from app.objectives import OBJECTIVES
from app.optimizers import OPTIMIZERS
from app.planning.memory import passes
from app.planning.schedule import MIN_STEPS
from app.run_settings import RunSettings
from app.shapes import Shape
from app.spec import MAX_CLASSES, SILENT, JobSpec, ModelRef
from app.strategies import STRATEGIES, Strategy
from app.strategies._chosen import ChosenLowRank
from app.strategies._own_weights import WithOwnWeights
from app.tables import Dataset

MIN_ROOM = 4
"""Tokens of a row that must fit next to a strategy's virtual tokens, or there is nothing to train on."""
NAMED = 5
MIN_FP8_CAPABILITY = 8.9
"""NVIDIA's Ada; earlier GPUs have no fp8 products."""


# Refused --------------------------------------------------------------------------------------------------------------

GRADIENT_ONLY = (
    "batch_size", "gradient_accumulation_steps", "packing", "neftune_noise_alpha", "rehearsal_fraction", "new_tokens",
    "eval_steps", "save_steps", "save_total_limit", "metric_for_best", "load_best", "graded_rows",
)  # fmt: skip
"""Settings without effect where frozen features are computed once and a classifier is fitted to them."""
STEPS_ONLY = ("optimizer", "adam_beta1", "adam_beta2", "adam_epsilon", "warmup_steps", "num_cycles", "decay_fraction", "min_lr_fraction")
"""Settings without effect either where that classifier is logistic regression, which takes no optimizer steps."""
GRADIENT_QUIET = (
    "epochs", "max_tokens_per_step", "max_steps", "micro_batches", "train_on", "chat_template", "chat_template_jinja",
    "evaluations_per_epoch", "sample_tokens", "gradient_checkpointing",
)  # fmt: skip
STEPS_QUIET = ("learning_rate", "schedule", "warmup_fraction", "weight_decay", "max_grad_norm", "early_stopping_patience")
"""More of both kinds, which are not refused: a comparison sends them to all of its methods."""


def refuse_labels(task: str, dataset: Dataset, validation: Dataset | None, param: str, validation_param: str) -> None:
    """Raises BadField for labels that no classifier can be trained on. A dataset still being parsed is checked when it is ready."""
    if not OBJECTIVES[task].classifies or dataset.status != "ready":
        return
    labels, count = labels_of(dataset)
    if count == 1:
        raise BadField(
            f"All {dataset.good_rows or 0:,} rows of {dataset.name} have the label “{shown(next(iter(labels)), 60)}”, "
            "so there is nothing to classify.",
            hint="Add rows of another class, or check on the dataset's page which column holds the label.",
            param=param,
            code="one_class",
        )
    if count > MAX_CLASSES:
        raise BadField(
            f"The rows of {dataset.name} have {count:,} different labels; a classifier takes at most {MAX_CLASSES:,}.",
            hint="Check on the dataset's page which column holds the label: one that names every row is none.",
            param=param,
            code="too_many_classes",
        )
    if validation is not None and validation.status == "ready" and len(labels) == count:
        unseen = [label for label in labels_of(validation)[0] if label not in labels]
        if unseen:
            raise BadField(
                f"{_count(len(unseen), 'label', 'labels')} of the validation dataset {validation.name} "
                f"{'is' if len(unseen) == 1 else 'are'} in no training row: {_named(unseen)}.",
                hint="Add training rows of these classes, or remove or fix those rows of the validation dataset.",
                param=validation_param,
                code="unseen_labels",
            )


def refuse_untunable(model: ModelRef, task: str) -> None:
    """Raises BadField for a model that no strategy can fine-tune further for this task."""
    if reason := why_not_tuned(model, task):
        raise BadField(reason, hint="Fine-tune the base model instead.", param="model", code="cannot_be_tuned")


def why_not_tuned(model: ModelRef, task: str) -> str | None:
    """Why no strategy can fine-tune this model for this task; None where some can.

    Further fine-tuning starts from the plain model, so all its adapters must be merged into its weights first.
    """
    if model.shape.encodes and not OBJECTIVES[task].encoders_write:
        return f"{model.name} is an encoder–decoder, which is trained on writing answers to prompts, and not for {task}."
    if model.labels and not OBJECTIVES[task].classifies:
        return f"{model.name} is {SILENT.get(model.kind, SILENT['classifier'])}: it writes no text, so it cannot be trained to."
    if model.labels and model.adapters:
        return (
            f"{model.name} is {SILENT.get(model.kind, SILENT['classifier'])} on top of another model, so it cannot be fine-tuned further."
        )
    for adapter in model.adapters:
        cls = STRATEGIES.get(adapter.strategy)
        if cls is None or not cls.merges:
            how = cls.title if cls else adapter.strategy
            return f"{model.name} was made by {how}, which cannot be merged, so it cannot be fine-tuned further."
    return None


def refuse_unread(strategy: Strategy, run: RunSettings) -> None:
    """Raises BadField for a setting that the strategy would ignore."""
    for name in strategy.unused():
        if getattr(strategy, name) != type(strategy).model_fields[name].default:
            raise BadField(
                f"{name} means nothing with the other settings of {strategy.title}.",
                hint="Omit it.",
                param=f"strategy.{name}",
                code="setting_without_use",
            )
    if type(strategy).recipe != "features":
        return
    unread = GRADIENT_ONLY + (STEPS_ONLY if getattr(strategy, "classifier", None) == "logistic" else ())
    for name in unread:
        if getattr(run, name) != RunSettings.model_fields[name].default:
            raise BadField(
                f"{strategy.title} reads the base once and fits a classifier to its vectors, where {name} means nothing.",
                hint="Omit it, or choose another method.",
                param=f"run.{name}",
                code="setting_without_use",
            )


def without_effect(strategy: Strategy) -> tuple[str, ...]:
    """The run settings that have no effect with this strategy, refused or not."""
    if type(strategy).recipe != "features":
        return ()
    fitted = getattr(strategy, "classifier", None) == "logistic"
    return GRADIENT_ONLY + GRADIENT_QUIET + (STEPS_ONLY + STEPS_QUIET if fitted else ())


def refuse_turns(run: RunSettings, task: str, format_: str | None) -> None:
    """Raises BadField for a choice of turns where rows have none to choose from, and for padding where there is none."""
    entry = OBJECTIVES[task]
    if not run.packing and not entry.unpacked:
        raise BadField(
            f"Rows are always packed where a job learns {task}.",
            hint="Leave packing out.",
            param="run.packing",
            code="setting_without_use",
        )
    if run.train_on == "assistant" or (entry.turns and formats.asks(format_)):
        return
    rows = "plain text, all of which is learned" if entry.turns else f"for {task}, which trains on them as they are"
    raise BadField(
        f"train_on chooses among the turns of a conversation, and these rows are {rows}.",
        hint="Leave train_on out.",
        param="run.train_on",
        code="setting_without_use",
    )


def refuse_without_prompt(shape: Shape, format_: str | None) -> None:
    """Raises BadField for rows without a prompt, which an encoder–decoder has nothing to read of."""
    if shape.encodes and format_ and not formats.asks(format_):
        raise BadField(
            "An encoder–decoder reads a prompt and writes the answer, and these rows are plain text.",
            hint="Use rows with a prompt and an answer, or choose a decoder.",
            param="training_file",
            code="no_prompts",
        )


def refuse_rehearsal(run: RunSettings, task: str) -> None:
    """Raises BadField for general rows where a job does not train on writing text, and where rows are padded instead of packed."""
    if not run.rehearsal_fraction:
        return
    reason = None
    if not OBJECTIVES[task].rehearses:
        taking = " and ".join(name for name, entry in OBJECTIVES.items() if entry.rehearses)
        reason, hint = (
            f"General rows are texts that the model wrote, which a job for {task} does not train on; one for {taking} does.",
            "Leave rehearsal_fraction out.",
        )
    elif not run.packing:
        reason, hint = "General rows fill up packs, and packing is off.", "Leave packing out, or rehearsal_fraction."
    if reason:
        raise BadField(reason, hint=hint, param="run.rehearsal_fraction", code="setting_without_use")


def refuse_new_tokens(strategy: Strategy, run: RunSettings, task: str, shape: Shape) -> None:
    """Raises BadField for new tokens where a job does not train on writing text, where a strategy saves whole tables beside them, and where a
    model failed with them when it was added."""
    if run.new_tokens is None:
        return
    if not OBJECTIVES[task].adds_tokens:
        taking = " and ".join(name for name, entry in OBJECTIVES.items() if entry.adds_tokens)
        raise BadField(
            f"New tokens are learned where a model trains on writing text: in a job for {taking}, not for {task}.",
            hint=f"Leave new_tokens out, or add them in a job for {taking} and fine-tune its result.",
            param="run.new_tokens",
            code="setting_without_use",
        )
    if reason := dict(shape.structure.refused if shape.structure else ()).get("new_tokens"):
        raise BadField(
            f"When the model was added, new tokens failed: {reason}.",
            hint="Leave new_tokens out, or choose another model.",
            param="run.new_tokens",
            code="no_new_tokens",
        )
    if getattr(strategy, "modules_to_save", None):
        raise BadField(
            "The rows of new tokens learn by themselves; modules_to_save trains and saves every other row too.",
            hint="Leave modules_to_save out, or new_tokens.",
            param="strategy.modules_to_save",
            code="setting_without_use",
        )


def refuse_template(run: RunSettings, task: str, kind: str, format_: str | None) -> None:
    """Raises BadField for a chat template where rows are no conversations."""
    if run.chat_template == "model":
        return
    entry = OBJECTIVES[task]
    as_they_stand = kind == "generic" and (entry.compares or (formats.asks(format_) and not formats.conversations(format_)))
    if entry.classifies or not formats.asks(format_) or as_they_stand:
        rows = "texts to be sorted" if entry.classifies else "trained on as they stand by this model"
        raise BadField(
            f"A chat template writes conversations, and these rows are {rows}.",
            hint="Leave chat_template out." if not as_they_stand else "Leave chat_template out, or use rows with messages.",
            param="run.chat_template",
            code="setting_without_use",
        )


def refuse_modules(strategy: Strategy, shape: Shape, task: str) -> None:
    """Raises BadField for names that match none of the model's modules, and for biases or embeddings where there are none."""
    unknown = strategy.unknown_modules(shape) if isinstance(strategy, ChosenLowRank) else []
    if unknown:
        raise BadField(
            f"No module of the model is called {_named(unknown)}.",
            hint=f"Every block has {', '.join(linear.name for linear in shape.linears())}; the first is {next(shape.modules())[0]}.",
            param="strategy.target_modules",
            code="no_such_module",
        )
    if isinstance(strategy, WithOwnWeights) and strategy.bias != "none" and not strategy.biases(shape):
        whose = "layers that LoRA is on" if strategy.bias == "lora_only" else "model"
        raise BadField(
            f"The {whose} {'have' if strategy.bias == 'lora_only' else 'has'} no biases to train.",
            hint="Leave bias out."
            if strategy.model_copy(update={"bias": "all"}).biases(shape) == 0
            else "Leave bias out, or set it to all.",
            param="strategy.bias",
            code="no_biases",
        )
    if isinstance(strategy, WithOwnWeights) and strategy.modules_to_save and (shape.architecture != "decoder" or OBJECTIVES[task].heads):
        raise BadField(
            "Tables of words are trained whole where a model trains on writing text, which this job does not.",
            hint="Leave modules_to_save out.",
            param="strategy.modules_to_save",
            code="setting_without_use",
        )


def refuse_device(run: RunSettings, machine: Machine) -> None:
    """Raises BadField for a GPU that the training machine does not have, and for an optimizer that needs one."""
    if run.device == "cuda" and not machine.cuda:
        raise BadField(
            "The device cuda needs an NVIDIA GPU, and the machine that trains shows none.",
            hint="Take auto or cpu. `luthier doctor` on that machine tells why a GPU is not seen.",
            param="run.device",
            code="needs_gpu",
        )
    if OPTIMIZERS[run.optimizer].needs_gpu and not machine.on(run.device).cuda:
        raise BadField(
            f"The 8-bit optimizer {run.optimizer} needs an NVIDIA GPU, and {_no_gpu(run, machine)}.",
            hint="Take adamw. To save memory without a GPU, train fewer weights (LoRA and its variants), lower the tokens per batch, "
            "or split each batch into more micro-batches.",
            param="run.optimizer",
            code="needs_gpu",
        )


def _no_gpu(run: RunSettings, machine: Machine) -> str:
    """Why a run has no GPU."""
    return "the run's device is cpu" if machine.cuda and run.device == "cpu" else "the machine that trains shows none"


def refuse_without_gpu(strategy: Strategy, run: RunSettings, task: str, machine: Machine) -> None:
    """Raises BadField for settings that need a GPU, or a newer one, than this machine has, or another strategy."""
    refuse_device(run, machine)
    if machine.processes > 1 and not strategy.adapter and not OPTIMIZERS[run.optimizer].spreads:
        raise BadField(
            f"{run.optimizer} needs whole weights, and {machine.processes} processes share those of {strategy.title}.",
            hint=f"Take one of {', '.join(name for name, kind in OPTIMIZERS.items() if kind.spreads)}, or use LoRA.",
            param="run.optimizer",
            code="needs_whole_weights",
        )
    each = passes(run, machine.processes)
    if run.batch_size and (run.batch_size * run.gradient_accumulation_steps) % each:
        raise BadField(
            f"{machine.processes} processes share a step in {each} passes, which its rows cannot be shared out to evenly.",
            hint=f"Take a batch size that {each} divides.",
            param="run.batch_size",
            code="uneven_batch",
        )
    if run.frozen_weights != "fp8":
        return
    reason = None
    if not machine.on(run.device).cuda:
        reason = f"Products in fp8 need an NVIDIA GPU, and {_no_gpu(run, machine)}."
    elif machine.gpu_capability is not None and machine.gpu_capability < MIN_FP8_CAPABILITY:
        reason = f"Products in fp8 need a GPU of capability {MIN_FP8_CAPABILITY} or later; {machine.gpu_name} has {machine.gpu_capability}."
    elif getattr(strategy, "bias", "none") != "none" or getattr(strategy, "modules_to_save", None):
        reason = "Biases and tables that learn need a base whose weights are kept as they are, not in fp8."
    elif not strategy.takes_fp8:
        reason = f"{strategy.title} changes or reads the frozen weights itself, which fp8 would round."
    elif not OBJECTIVES[task].fp8 or run.precision == "fp32":
        reason = "Products in fp8 are offered for generation jobs, in bf16."
    if reason:
        raise BadField(reason, hint="Set frozen_weights to auto.", param="run.frozen_weights", code="no_fp8")


def refuse_no_room(strategy: Strategy, run: RunSettings, shape: Shape) -> None:
    """Raises BadField where a strategy's virtual tokens leave no room for the row."""
    before, longest = strategy.virtual_tokens(), longest_row(run, shape)
    if before and longest - before < MIN_ROOM:
        whose = "the model reads at once" if shape.positions <= run.max_length else "a row may have"
        raise BadField(
            f"{strategy.title} puts {before} trained tokens before each row, and {longest} are all that {whose}: no room is left.",
            hint="Choose fewer trained tokens, or a greater max length.",
            param="strategy",
            code="no_room",
        )


def longest_row(run: RunSettings, shape: Shape) -> int:
    """Tokens to which longer rows are truncated: the max sequence length, or the model's context window where that is less."""
    return min(run.max_length, shape.positions)


# Told -----------------------------------------------------------------------------------------------------------------


def warnings(spec: JobSpec, dataset: Dataset, validation: Dataset | None = None) -> list[str]:
    """Warnings about the data, each a sentence with its hint."""
    found = [*_left_out(dataset), *_too_long(spec, dataset)]
    if OBJECTIVES[spec.task].classifies:
        found += _odd_labels(dataset)
    if validation is not None:
        found += [f"Validation dataset: {text}" for text in (*_left_out(validation), *_too_long(spec, validation))]
    return found


def later_failed(dataset: Dataset, later: Dataset | None) -> list[str]:
    """A warning that a newer version of the same file failed to parse, so that an older one is trained on."""
    if later is None:
        return []
    said = (later.error or {}).get("message") or "It has no valid row."
    return [
        f"Version {later.version} of {later.name}, read from the same file, failed, so version {dataset.version} is used. It said: {said} "
        "Change its format or columns on its page, or delete it."
    ]


def few_steps(spec: JobSpec, steps: int) -> list[str]:
    """A warning that a job ends before it has learned anything. `steps` are those of the estimate."""
    if steps >= MIN_STEPS or type(spec.strategy).recipe == "features":
        return []
    return [
        f"{steps} optimizer steps are few: most methods have hardly begun to train after {MIN_STEPS}. Choose a longer preset, raise the epochs, or lower the tokens per batch."
    ]


def _left_out(dataset: Dataset) -> list[str]:
    bad = (dataset.rows or 0) - (dataset.good_rows or 0)
    if bad <= 0:
        return []
    empty = _finding(dataset, "empty")
    which = f", {empty:,} of them because a text is empty" if empty else ""
    return [
        f"{bad:,} of {dataset.rows:,} rows of {dataset.name} are excluded{which}. The dataset's report lists each with its line and a fix."
    ]


def _too_long(spec: JobSpec, dataset: Dataset) -> list[str]:
    """A warning about rows beyond the max sequence length. The counts come from one tokenizer, which need not be this model's, so
    they are rounded."""
    report: dict[str, Any] = dataset.report or {}
    limit = longest_row(spec.run, spec.model.shape) - spec.strategy.virtual_tokens()
    longest = report.get("longest") or report.get("longest_characters", 0) / 4
    if longest <= limit:
        return []
    # Exact for the usual limits: buckets begin at powers of two, so those that begin beyond the limit are certainly longer.
    exact = dict(report.get("rows_cut", []))
    rows = exact.get(limit, sum(count for start, count in report.get("token_lengths", []) if start > limit))
    window = spec.model.shape.positions <= spec.run.max_length
    whose = f"the model reads {limit:,} at once" if window else f"this job truncates rows to {limit:,}"
    hint = (
        "Split long texts into several rows, or take a model with a longer window." if window else "Raise “Max length” to keep them whole."
    )
    many = f", and {'' if limit in exact else 'at least '}{_count(rows, 'row is', 'rows are')} longer than that" if rows else ""
    return [f"The longest row of {dataset.name} has about {_round(longest):,} tokens; {whose}{many}. They are truncated. {hint}"]


def _odd_labels(dataset: Dataset) -> list[str]:
    labels, count = labels_of(dataset)
    found = []
    rows = dataset.good_rows or 0
    if count > 20 and count > rows / 2:
        found.append(
            f"{dataset.name} has {count:,} labels for {rows:,} rows. Check on its page which column holds the label: nearly every row has its own."
        )
    elif lone := _finding(dataset, "rare_label"):
        names = [label for label, number in labels.items() if number == 1]
        found.append(
            f"{_count(lone, 'class has', 'classes have')} one row only ({_named(names)}): it can be trained or evaluated, not both. "
            "Add rows, or merge such classes with others."
        )
    if _finding(dataset, "mixed_labels"):
        numbers = [label for label in labels if label.lstrip("-").replace(".", "", 1).isdigit()]
        found.append(f"Some labels are numbers ({_named(numbers)}) and the others are words. Check that they mean what they should.")
    return found


def labels_of(dataset: Dataset) -> tuple[dict[str, int], int]:
    """The most frequent labels with their rows, and the number of labels; ({}, 0) where the report has none."""
    report = dataset.report or {}
    labels: dict[str, int] = report.get("labels") or {}
    return labels, report.get("label_count") or len(labels)


def _finding(dataset: Dataset, rule: str) -> int:
    return int((dataset.report or {}).get("findings", {}).get(rule, {}).get("count", 0))


def _named(labels: list[str]) -> str:
    shown_ = ", ".join(f"“{shown(label, 40)}”" for label in labels[:NAMED])
    return shown_ + (", …" if len(labels) > NAMED else "")


def _count(number: int, one: str, many: str) -> str:
    return f"{number:,} {one if number == 1 else many}"


def _round(value: float) -> int:
    """Rounded to two significant digits."""
    return int(float(f"{value:.2g}"))
