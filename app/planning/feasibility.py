"""Checks of a job's settings and data before it is created: what is refused. `app/planning/data_warnings.py` has what a person is warned about.

Everything is read off the datasets' reports, so it costs no pass over the rows. What is refused would fail in the trainer minutes
later.
"""

from __future__ import annotations

from app import formats
from app.errors import BadField
from app.formats._base import shown
from app.kit.humanize import human_number
from app.languages import gettext, ngettext
from app.machines.hardware import Machine
from app.objectives import OBJECTIVES
from app.optimizers import OPTIMIZERS
from app.planning.memory import passes
from app.run_settings import RunSettings
from app.shapes import Shape
from app.spec import MAX_CLASSES, SILENT, ModelRef
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
            gettext(
                "All %(rows)s rows of %(name)s have the label “%(label)s”, so there is nothing to classify.",
                rows=human_number(dataset.good_rows or 0),
                name=dataset.name,
                label=shown(next(iter(labels)), 60),
            ),
            hint=gettext("Add rows of another class, or check on the dataset's page which column holds the label."),
            param=param,
            code="one_class",
        )
    if count > MAX_CLASSES:
        raise BadField(
            gettext(
                "The rows of %(name)s have %(count)s different labels; a classifier takes at most %(most)s.",
                name=dataset.name,
                count=human_number(count),
                most=human_number(MAX_CLASSES),
            ),
            hint=gettext("Check on the dataset's page which column holds the label: one that names every row is none."),
            param=param,
            code="too_many_classes",
        )
    if validation is not None and validation.status == "ready" and len(labels) == count:
        unseen = [label for label in labels_of(validation)[0] if label not in labels]
        if unseen:
            raise BadField(
                ngettext(
                    "%(num)s label of the validation dataset %(name)s is in no training row: %(labels)s.",
                    "%(num)s labels of the validation dataset %(name)s are in no training row: %(labels)s.",
                    len(unseen),
                    name=validation.name,
                    labels=named(unseen),
                ),
                hint=gettext("Add training rows of these classes, or remove or fix those rows of the validation dataset."),
                param=validation_param,
                code="unseen_labels",
            )


def refuse_untunable(model: ModelRef, task: str) -> None:
    """Raises BadField for a model that no strategy can fine-tune further for this task."""
    if reason := why_not_tuned(model, task):
        raise BadField(reason, hint=gettext("Fine-tune the base model instead."), param="model", code="cannot_be_tuned")


def why_not_tuned(model: ModelRef, task: str) -> str | None:
    """Why no strategy can fine-tune this model for this task; None where some can.

    Further fine-tuning starts from the plain model, so all its adapters must be merged into its weights first.
    """
    if model.shape.encodes and not OBJECTIVES[task].encoders_write:
        return gettext(
            "%(name)s is an encoder–decoder, which is trained on writing answers to prompts, and not for %(task)s.",
            name=model.name,
            task=task,
        )
    kind = gettext(SILENT.get(model.kind, SILENT["classifier"]))
    if model.labels and not OBJECTIVES[task].classifies:
        return gettext("%(name)s is %(kind)s: it writes no text, so it cannot be trained to.", name=model.name, kind=kind)
    if model.labels and model.adapters:
        return gettext("%(name)s is %(kind)s on top of another model, so it cannot be fine-tuned further.", name=model.name, kind=kind)
    for adapter in model.adapters:
        cls = STRATEGIES.get(adapter.strategy)
        if cls is None or not cls.merges:
            return gettext(
                "%(name)s was made by %(method)s, which cannot be merged, so it cannot be fine-tuned further.",
                name=model.name,
                method=gettext(cls.title) if cls else adapter.strategy,
            )
    return None


def refuse_unread(strategy: Strategy, run: RunSettings) -> None:
    """Raises BadField for a setting that the strategy would ignore."""
    for name in strategy.unused():
        if getattr(strategy, name) != type(strategy).model_fields[name].default:
            raise BadField(
                gettext("%(name)s means nothing with the other settings of %(method)s.", name=name, method=gettext(strategy.title)),
                hint=gettext("Omit it."),
                param=f"strategy.{name}",
                code="setting_without_use",
            )
    if type(strategy).recipe != "features":
        return
    unread = GRADIENT_ONLY + (STEPS_ONLY if getattr(strategy, "classifier", None) == "logistic" else ())
    for name in unread:
        if getattr(run, name) != RunSettings.model_fields[name].default:
            raise BadField(
                gettext(
                    "%(method)s reads the base once and fits a classifier to its vectors, where %(name)s means nothing.",
                    method=gettext(strategy.title),
                    name=name,
                ),
                hint=gettext("Omit it, or choose another method."),
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
            gettext("Rows are always packed where a job learns %(task)s.", task=task),
            hint=gettext("Leave packing out."),
            param="run.packing",
            code="setting_without_use",
        )
    if run.train_on == "assistant" or (entry.turns and formats.asks(format_)):
        return
    if entry.turns:
        reason = gettext("train_on chooses among the turns of a conversation, and these rows are plain text, all of which is learned.")
    else:
        reason = gettext(
            "train_on chooses among the turns of a conversation, and these rows are for %(task)s, which trains on them as they are.",
            task=task,
        )
    raise BadField(
        reason,
        hint=gettext("Leave train_on out."),
        param="run.train_on",
        code="setting_without_use",
    )


def refuse_without_prompt(shape: Shape, format_: str | None) -> None:
    """Raises BadField for rows without a prompt, which an encoder–decoder has nothing to read of."""
    if shape.encodes and format_ and not formats.asks(format_):
        raise BadField(
            gettext("An encoder–decoder reads a prompt and writes the answer, and these rows are plain text."),
            hint=gettext("Use rows with a prompt and an answer, or choose a decoder."),
            param="training_file",
            code="no_prompts",
        )


def refuse_rehearsal(run: RunSettings, task: str) -> None:
    """Raises BadField for general rows where a job does not train on writing text, and where rows are padded instead of packed."""
    if not run.rehearsal_fraction:
        return
    reason = None
    if not OBJECTIVES[task].rehearses:
        reason = gettext(
            "General rows are texts that the model wrote, which a job for %(task)s does not train on; one for %(taking)s does.",
            task=task,
            taking=_joined([name for name, entry in OBJECTIVES.items() if entry.rehearses]),
        )
        hint = gettext("Leave rehearsal_fraction out.")
    elif not run.packing:
        reason = gettext("General rows fill up packs, and packing is off.")
        hint = gettext("Leave packing out, or rehearsal_fraction.")
    if reason:
        raise BadField(reason, hint=hint, param="run.rehearsal_fraction", code="setting_without_use")


def refuse_new_tokens(strategy: Strategy, run: RunSettings, task: str, shape: Shape) -> None:
    """Raises BadField for new tokens where a job does not train on writing text, where a strategy saves whole tables beside them, and where a
    model failed with them when it was added."""
    if run.new_tokens is None:
        return
    if not OBJECTIVES[task].adds_tokens:
        taking = _joined([name for name, entry in OBJECTIVES.items() if entry.adds_tokens])
        raise BadField(
            gettext(
                "New tokens are learned where a model trains on writing text: in a job for %(taking)s, not for %(task)s.",
                taking=taking,
                task=task,
            ),
            hint=gettext("Leave new_tokens out, or add them in a job for %(taking)s and fine-tune its result.", taking=taking),
            param="run.new_tokens",
            code="setting_without_use",
        )
    if reason := dict(shape.structure.refused if shape.structure else ()).get("new_tokens"):
        raise BadField(
            gettext("When the model was added, new tokens failed: %(reason)s.", reason=reason),
            hint=gettext("Leave new_tokens out, or choose another model."),
            param="run.new_tokens",
            code="no_new_tokens",
        )
    if getattr(strategy, "modules_to_save", None):
        raise BadField(
            gettext("The rows of new tokens learn by themselves; modules_to_save trains and saves every other row too."),
            hint=gettext("Leave modules_to_save out, or new_tokens."),
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
        if entry.classifies:
            reason = gettext("A chat template writes conversations, and these rows are texts to be sorted.")
        else:
            reason = gettext("A chat template writes conversations, and these rows are trained on as they stand by this model.")
        raise BadField(
            reason,
            hint=gettext("Leave chat_template out, or use rows with messages.") if as_they_stand else gettext("Leave chat_template out."),
            param="run.chat_template",
            code="setting_without_use",
        )


def refuse_modules(strategy: Strategy, shape: Shape, task: str) -> None:
    """Raises BadField for names that match none of the model's modules, and for biases or embeddings where there are none."""
    unknown = strategy.unknown_modules(shape) if isinstance(strategy, ChosenLowRank) else []
    if unknown:
        raise BadField(
            gettext("No module of the model is called %(names)s.", names=named(unknown)),
            hint=gettext(
                "Every block has %(names)s; the first is %(first)s.",
                names=", ".join(linear.name for linear in shape.linears()),
                first=next(shape.modules())[0],
            ),
            param="strategy.target_modules",
            code="no_such_module",
        )
    if isinstance(strategy, WithOwnWeights) and strategy.bias != "none" and not strategy.biases(shape):
        in_layers = strategy.bias == "lora_only"
        none_at_all = strategy.model_copy(update={"bias": "all"}).biases(shape) == 0
        raise BadField(
            gettext("The layers that LoRA is on have no biases to train.") if in_layers else gettext("The model has no biases to train."),
            hint=gettext("Leave bias out.") if none_at_all else gettext("Leave bias out, or set it to all."),
            param="strategy.bias",
            code="no_biases",
        )
    if isinstance(strategy, WithOwnWeights) and strategy.modules_to_save and (shape.architecture != "decoder" or OBJECTIVES[task].heads):
        raise BadField(
            gettext("Tables of words are trained whole where a model trains on writing text, which this job does not."),
            hint=gettext("Leave modules_to_save out."),
            param="strategy.modules_to_save",
            code="setting_without_use",
        )


def refuse_device(run: RunSettings, machine: Machine) -> None:
    """Raises BadField for a GPU that the training machine does not have, and for an optimizer that needs one."""
    if run.device == "cuda" and not machine.cuda:
        raise BadField(
            gettext("The device cuda needs an NVIDIA GPU, and the machine that trains shows none."),
            hint=gettext("Take auto or cpu. `luthier doctor` on that machine tells why a GPU is not seen."),
            param="run.device",
            code="needs_gpu",
        )
    if OPTIMIZERS[run.optimizer].needs_gpu and not machine.on(run.device).cuda:
        if _on_cpu(run, machine):
            reason = gettext("The 8-bit optimizer %(name)s needs an NVIDIA GPU, and the run's device is cpu.", name=run.optimizer)
        else:
            reason = gettext(
                "The 8-bit optimizer %(name)s needs an NVIDIA GPU, and the machine that trains shows none.", name=run.optimizer
            )
        raise BadField(
            reason,
            hint=gettext(
                "Take adamw. To save memory without a GPU, train fewer weights (LoRA and its variants), lower the tokens per batch, "
                "or split each batch into more micro-batches."
            ),
            param="run.optimizer",
            code="needs_gpu",
        )


def _on_cpu(run: RunSettings, machine: Machine) -> bool:
    """Whether a run has no GPU by its own setting, where the machine has one."""
    return machine.cuda and run.device == "cpu"


def refuse_without_gpu(strategy: Strategy, run: RunSettings, task: str, machine: Machine) -> None:
    """Raises BadField for settings that need a GPU, or a newer one, than this machine has, or another strategy."""
    refuse_device(run, machine)
    if machine.processes > 1 and not strategy.adapter and not OPTIMIZERS[run.optimizer].spreads:
        raise BadField(
            gettext(
                "%(name)s needs whole weights, and %(count)s processes share those of %(method)s.",
                name=run.optimizer,
                count=machine.processes,
                method=gettext(strategy.title),
            ),
            hint=gettext("Take one of %(names)s, or use LoRA.", names=", ".join(name for name, kind in OPTIMIZERS.items() if kind.spreads)),
            param="run.optimizer",
            code="needs_whole_weights",
        )
    each = passes(run, machine.processes)
    if run.batch_size and (run.batch_size * run.gradient_accumulation_steps) % each:
        raise BadField(
            gettext(
                "%(count)s processes share a step in %(passes)s passes, which its rows cannot be shared out to evenly.",
                count=machine.processes,
                passes=each,
            ),
            hint=gettext("Take a batch size that %(passes)s divides.", passes=each),
            param="run.batch_size",
            code="uneven_batch",
        )
    if run.frozen_weights == "fp8" and (reason := _no_fp8(strategy, run, task, machine)):
        raise BadField(reason, hint=gettext("Set frozen_weights to auto."), param="run.frozen_weights", code="no_fp8")


def _no_fp8(strategy: Strategy, run: RunSettings, task: str, machine: Machine) -> str | None:
    """Why frozen products cannot be computed in fp8; None where they can."""
    if not machine.on(run.device).cuda:
        if _on_cpu(run, machine):
            return gettext("Products in fp8 need an NVIDIA GPU, and the run's device is cpu.")
        return gettext("Products in fp8 need an NVIDIA GPU, and the machine that trains shows none.")
    if machine.gpu_capability is not None and machine.gpu_capability < MIN_FP8_CAPABILITY:
        return gettext(
            "Products in fp8 need a GPU of capability %(least)s or later; %(name)s has %(has)s.",
            least=MIN_FP8_CAPABILITY,
            name=machine.gpu_name,
            has=machine.gpu_capability,
        )
    if getattr(strategy, "bias", "none") != "none" or getattr(strategy, "modules_to_save", None):
        return gettext("Biases and tables that learn need a base whose weights are kept as they are, not in fp8.")
    if not strategy.takes_fp8:
        return gettext("%(method)s changes or reads the frozen weights itself, which fp8 would round.", method=gettext(strategy.title))
    if not OBJECTIVES[task].fp8 or run.precision == "fp32":
        return gettext("Products in fp8 are offered for generation jobs, in bf16.")
    return None


def refuse_no_room(strategy: Strategy, run: RunSettings, shape: Shape) -> None:
    """Raises BadField where a strategy's virtual tokens leave no room for the row."""
    before, longest = strategy.virtual_tokens(), longest_row(run, shape)
    if before and longest - before < MIN_ROOM:
        values = {"method": gettext(strategy.title), "trained": before, "most": longest}
        if shape.positions <= run.max_length:
            reason = gettext(
                "%(method)s puts %(trained)s trained tokens before each row, and %(most)s are all that the model reads at once: no room is left.",
                **values,
            )
        else:
            reason = gettext(
                "%(method)s puts %(trained)s trained tokens before each row, and %(most)s are all that a row may have: no room is left.",
                **values,
            )
        raise BadField(
            reason,
            hint=gettext("Choose fewer trained tokens, or a greater max length."),
            param="strategy",
            code="no_room",
        )


def longest_row(run: RunSettings, shape: Shape) -> int:
    """Tokens to which longer rows are truncated: the max sequence length, or the model's context window where that is less."""
    return min(run.max_length, shape.positions)


def labels_of(dataset: Dataset) -> tuple[dict[str, int], int]:
    """The most frequent labels with their rows, and the number of labels; ({}, 0) where the report has none."""
    report = dataset.report or {}
    labels: dict[str, int] = report.get("labels") or {}
    return labels, report.get("label_count") or len(labels)


def named(labels: list[str]) -> str:
    shown_ = ", ".join(f"“{shown(label, 40)}”" for label in labels[:NAMED])
    return shown_ + (", …" if len(labels) > NAMED else "")


def _joined(names: list[str]) -> str:
    return f" {gettext('and')} ".join(names)
