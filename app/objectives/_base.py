"""The properties of objectives. No torch: the computation is in `worker/training/objectives/`."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import BaseModel

from app.languages import mark
from app.objectives._settings import ObjectiveSettings

Kinds = tuple[Literal["generic", "instruction", "dialogue", "encoder"], ...]


class Objective:
    """One objective. A subclass in `app/objectives/NAME.py` is registered by being there."""

    name: ClassVar[str]  # `task` in a spec, in the API and of a dataset
    title: ClassVar[str]
    summary: ClassVar[str]  # one sentence
    paper: ClassVar[tuple[str, str] | None] = None  # (citation, URL)
    place: ClassVar[int] = 100  # order in lists, lowest first
    method: ClassVar[str] = "supervised"  # `method.type` of the fine-tuning API; the first objective with a type is its default
    # What it trains on -------------------------------------------------------------------------------------------------
    formats: ClassVar[tuple[str, ...]] = ()  # formats it trains on in addition to those whose `task` it is
    model_kinds: ClassVar[Kinds] = ("dialogue", "instruction", "generic")  # suitable kinds of models, best first
    trains_as: ClassVar[str | None] = None  # the objective whose strategies can train it; None: strategies list it themselves
    # What it is --------------------------------------------------------------------------------------------------------
    classifies: ClassVar[bool] = False  # rows have a label, which a new head on the model predicts
    heads: ClassVar[bool] = False  # a new head is trained on the model without its own, so that the result writes no text
    result_kind: ClassVar[str | None] = None  # the kind of the tuned model; None: that of its base or its rows
    copies: ClassVar[bool] = False  # every answer of a row is trained, so a row must hold no bad one
    compares: ClassVar[bool] = False  # it compares answers: without a new head, strategies use a smaller rate (`preference_share`)
    scored: ClassVar[bool] = True  # a row has one right answer or label, by which a model or a prompt can be scored
    settings: ClassVar[type[ObjectiveSettings] | None] = None  # its own settings, the field `preference` of a spec
    draws: ClassVar[bool] = False  # it trains on answers that the model draws to the prompts of the rows
    rewards: ClassVar[bool] = False  # a grader scores these answers
    teaches: ClassVar[bool] = False  # another model, the teacher, is read next to the one that trains
    # Which run settings it takes ---------------------------------------------------------------------------------------
    turns: ClassVar[bool] = False  # `train_on` selects turns of its rows
    rehearses: ClassVar[bool] = False  # general rows may be played in against forgetting (`rehearsal_fraction`)
    encoders_write: ClassVar[bool] = False  # encoder–decoders can be trained for it
    adds_tokens: ClassVar[bool] = False  # tokens may be added to the model's vocabulary (`new_tokens`)
    unpacked: ClassVar[bool] = False  # rows can be padded instead of packed
    fp8: ClassVar[bool] = False  # frozen products may be computed in fp8
    uniform: ClassVar[bool] = False  # packs may share one shape, so that a GPU's layers are compiled once
    # What it costs -----------------------------------------------------------------------------------------------------
    sequences_per_row: ClassVar[int] = 1  # sequences per row
    beside: ClassVar[int] = 0  # sequences per row that every pass reads too, without gradients
    min_rows_per_step: ClassVar[int] = 2
    rows_per_step: ClassVar[int | None] = None  # target number of rows per step; None: tokens
    min_step_tokens: ClassVar[int] = 256
    larger_on_gpu: ClassVar[bool] = False  # the batch grows with the GPU's memory
    # How it is judged --------------------------------------------------------------------------------------------------
    metrics: ClassVar[tuple[str, ...]] = ("loss",)  # columns of a comparison, the deciding one first; keys of METRICS
    across_models: ClassVar[tuple[str, ...]] = ()  # the same between base models of other tokenizers; empty: those above
    loss_unit: ClassVar[str] = ""  # the unit that a loss is averaged over, where that is not the trained token
    base_title: ClassVar[str] = mark("Base")  # what a finished job is compared with
    evaluation_base_title: ClassVar[str] = mark("Base")  # the same for an evaluation
    unfair: ClassVar[tuple[str, ...]] = ()  # metrics that cannot be better than that base's
    graded: ClassVar[bool] = False  # the model writes answers, which graders score at each evaluation
    few_shot: ClassVar[bool] = False  # at the end the base answers validation rows with few-shot examples

    def base_reads(self, settings: BaseModel | None) -> int:
        """How often the model before fine-tuning reads every row before the first step, with these settings of its own."""
        return 0
