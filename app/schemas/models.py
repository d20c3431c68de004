"""Models, the engines that answer for them, and loaded models."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from app.evaluation.gates import GateResult
from app.schemas.base import Listing, Problem, Schema
from app.shapes import Shape
from app.spec import Kind


class ModelEngine(Schema):
    """The server that answers for a model, and the model's name there."""

    url: str
    model: str
    via: Literal["tokens", "chat"]


class CertificateCheck(Schema):
    name: Literal["weights", "packed", "padded", "loss", "cached", "step", "new_tokens"]
    passed: bool
    value: float | None = Field(description="What was measured; null where nothing was.")
    bound: float | None = Field(description="The largest value that passes.")
    message: str


class CertificateStrategy(Schema):
    works: bool
    message: str | None = Field(None, description="Why it does not.")
    parameters: int | None = Field(None, description="Trained parameters with default settings.")
    loss_before: float | None = Field(None, description="Before and after three steps on random texts.")
    loss_after: float | None = None


class StepCost(Schema):
    """What a training step was measured to keep and take, in float32 on a CPU with so many threads, all weights frozen."""

    bytes_per_token: float = Field(description="Of all layers.")
    bytes_per_pair: float = Field(description="Of all layers, for each pair of a text's tokens.")
    operations_per_second: float
    threads: int


class Certificate(Schema):
    """What was tried on a model when it was added."""

    tier: Literal["A", "B", "C"] = Field(
        description="A: an architecture with exact formulas. B: its shape was read from the model itself. C: the same, and padded batches."
    )
    checks: list[CertificateCheck]
    strategies: dict[str, CertificateStrategy] = Field(
        description="By name; empty in tier A, whose strategies are tested with every release."
    )
    step: StepCost | None = Field(None, description="Null in tier A, which is estimated by formulas.")
    versions: dict[str, str] = Field(description="Of the libraries that it was tried with.")
    made_at: str


class Model(Schema):
    """A `model` as the OpenAI API has it; the fields after `owned_by` are additions."""

    id: str
    object: Literal["model"]
    created: int = Field(description="Seconds since 1970.")
    owned_by: Literal["luthier", "user"]
    key: str
    title: str
    kind: Kind
    tags: list[str]
    kept: bool = Field(description="False for a result of a comparison that nobody kept: pages omit it from their selects.")
    status: Literal["fetching", "ready", "error"]
    progress: float | None = Field(description="Of fetching, 0 to 1.")
    error: Problem | None
    base: str | None = Field(description="The model at the bottom of the lineage, where this one is a fine-tune.")
    lineage: list[str]
    job: str | None
    step: int | None = Field(description="Of the checkpoint it was kept from; null for the result of its job.")
    strategy: str | None
    adapter: bool
    shape: Shape | None
    parameters: int | None
    certificate: Certificate | None = Field(description="Null for a fine-tuned model, an encoder, and a starter.")
    bytes: int | None
    license: str | None
    labels: list[str] | None
    engine: ModelEngine | None
    revision: str | None
    adapter_sha256: str | None
    alias_of: str | None = Field(description="The model that this alias points to now; null for a model's own name.")


class HubModel(Schema):
    """A model of the Hugging Face hub."""

    object: Literal["hub_model"]
    repo: str
    parameters: int | None = Field(description="Null where it has no safetensors; it cannot be added then.")
    license: str | None
    downloads: int
    likes: int
    gated: bool = Field(description="Its terms must be accepted on the hub, and a token saved.")
    architecture: str | None = Field(description="Its model_type.")
    tier: Literal["A"] | None = Field(description="A where its arithmetic is known; null where it is tried when it is added.")
    fits: bool | None = Field(description="Whether LoRA on it fits the machine that trains, by a rule of thumb.")
    updated: str | None


class AliasGate(Schema):
    """What a model must pass before an alias is moved to it."""

    dataset: str = Field(description="Id of the dataset on which both models are scored.")
    grader: str = Field(description="Id of a saved grader, or bits_per_byte or accuracy.")
    max_forgetting: float | None = Field(description="How much more bits per byte general texts may take than with the model's base.")


class ModelAlias(Schema):
    """A name that you chose for a model."""

    id: str = Field(description="What `model` takes.")
    object: Literal["model.alias"]
    model: str = Field(description="The model that answers now.")
    gate: AliasGate | None = Field(description="What a model must pass before the alias is moved to it.")
    created_at: int = Field(description="Seconds since 1970.")
    moved_at: int = Field(description="When it was last set: seconds since 1970.")


class ModelAliasMove(Schema):
    """One move of an alias."""

    id: str
    object: Literal["model.alias.move"]
    alias: str
    from_: str | None = Field(alias="from", description="Null for the first model of the alias.")
    to: str
    how: Literal["set", "gate", "force", "back"] = Field(
        description="Set without a gate, through the gate, past it by force, or back to the model before."
    )
    by: str
    reason: str | None
    result: GateResult | None = Field(description="What the gate measured.")
    created_at: int = Field(description="Seconds since 1970.")


class EngineError(Schema):
    """Why an engine cannot be reached."""

    code: str
    message: str


class Engine(Schema):
    """An engine of the settings, and the models that it serves."""

    url: str
    object: Literal["engine"]
    models: list[str]
    error: EngineError | None


class EngineOfModel(Schema):
    """The server that answers for a model now; null is the built-in engine."""

    object: Literal["model.engine"]
    id: str
    engine: ModelEngine | None
    deleted: bool = False


class EngineFault(Schema):
    """What is wrong with an engine: its cause is adapter or weights."""

    cause: Literal["adapter", "weights"]
    message: str
    hint: str


class EngineCheck(Schema):
    """An engine compared with the weights that are here."""

    object: Literal["engine.check"]
    id: str
    engine: str = Field(description="Who answered.")
    prompts: int
    same_first_token: int = Field(description="Of the prompts.")
    distance: float = Field(description="Mean difference of the log-probabilities of the likeliest next tokens, in nats.")
    distance_to_base: float | None = Field(description="The same to the model without its adapter; null for one that has none.")
    fault: EngineFault | None


class LoadedModel(Schema):
    """A loaded model. Its name is null if it belongs to another user."""

    model: str | None
    tuned: list[str]
    bytes: int
    answering: int
    idle_seconds: float


class Generator(Schema):
    """The models that one generate worker has loaded, and its memory limit."""

    object: Literal["generator"]
    device: str
    used_bytes: int
    limit_bytes: int
    training_bytes: int
    models: list[LoadedModel]


class LoadedModels(Listing):
    """The loaded models of every generate worker."""

    data: list[Generator]
    rule: str = Field(description="When a model is loaded and unloaded, in words.")
