"""The base class of strategies: an immutable pydantic model whose fields are the settings.

The fields define the form, the API body, the stored row and the help page. The class variables are texts and properties. The
methods are the cost (pure arithmetic, no torch) and the implementation (`attach`, `save`, `load`, `merge`: the only places that
use torch, imported inside the method).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict

from app.languages import gettext, mark
from app.objectives import OBJECTIVES
from app.shapes import Shape
from app.strategies._advice import Facts, Reason, Situation, by_data, by_distance, by_labels, by_prompts
from app.strategies._advice import Family as Family  # re-exported for the strategies
from app.strategies._model import transformer

if TYPE_CHECKING:
    import torch


class Memory(NamedTuple):
    """Bytes that a strategy adds or changes, except activations, which are in `app/planning/memory.py`.

    `weights` are the frozen and trained weights, adapters included; `gradients` and `optimizer` are those of the trained ones.
    """

    weights: int
    gradients: int
    optimizer: int


class Kept(NamedTuple):
    """Values that one layer keeps for the backward pass of its trained weights: per token, and once."""

    per_token: int
    once: int = 0


class Loading(NamedTuple):
    """Python code that attaches a result to its base without Luthier: imports, lines, and the line that merges it."""

    imports: tuple[str, ...] = ()
    lines: str = ""
    folds: str = ""


UNNAMED = "lora"
"""The strategy of a request that names none."""
LABELS = (
    mark("Activation"), mark("Alpha"), mark("Arrangement"), mark("Bias"), mark("Block"), mark("Classifier"), mark("Depth"), mark("Dropout"),
    mark("Factor"), mark("Layers"), mark("Modules to save"), mark("Norm"), mark("Orthogonality"), mark("Output layer"), mark("Passes"),
    mark("Pooling"), mark("Rank"), mark("Regularisation"), mark("Scale"), mark("Start rank"), mark("Target modules"), mark("Tokens"),
    mark("Width"),
)  # fmt: skip
"""What `app.kit.forms.label_of` makes of the names of settings that have no title, for the catalogs."""


class Strategy(BaseModel, ABC):
    """One fine-tuning method. A subclass in `app/strategies/NAME.py` declares `name: Literal["NAME"] = "NAME"`.

    A field with `json_schema_extra={"basic": True}` is always visible in the form; the others are collapsed under "All settings".
    Each field needs a description: it is the help under the field.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    if TYPE_CHECKING:
        name: str = ""  # each subclass has its own
    else:
        name: str
    title: ClassVar[str]
    family: ClassVar[Family]
    tasks: ClassVar[tuple[str, ...]] = ("generation",)
    summary: ClassVar[str]  # one sentence
    when_to_use: ClassVar[str]
    forgets: ClassVar[Literal["little", "some", "much"]] = "little"
    paper: ClassVar[tuple[str, str] | None] = None  # (citation, URL)
    place: ClassVar[int] = 100  # order in the form, lowest first
    adapter: ClassVar[bool] = True  # the result needs its base's weights; False: it is a whole model
    merges: ClassVar[bool] = False  # `merge` gives a plain model with the same outputs
    blends: ClassVar[bool] = False  # `load_blended` can scale its change
    no_blend: ClassVar[str] = mark("what it changes has no halfway.")  # why not, where `blends` is false
    switchable: ClassVar[bool] = True  # one loaded base can serve it and others in turn, without loading twice
    default_learning_rate: ClassVar[float] = 2e-4
    preference_share: ClassVar[float] = 0.1  # of that rate, for pairs: DPO moves far with small steps
    base_bits: ClassVar[int | None] = None  # the base is loaded in this many bits; None: in the run's precision
    plain_lora: ClassVar[bool] = False  # what it saves is LoRA alone, which other servers load; what it trains besides is in its settings
    takes_fp8: ClassVar[bool] = False  # it only adds to frozen products, so that these may be made in fp8
    arithmetic: ClassVar[int] = 1  # raised when its layers are computed otherwise: a job begun before goes on, but not bit for bit
    suits: ClassVar[tuple[Situation, ...]] = ()  # situations in which the advisor recommends it
    unsuited: ClassVar[tuple[Situation, ...]] = ()  # and advises against it
    standing: ClassVar[Reason | None] = None  # reasons that apply to any data; None: those of its family
    any_architecture: ClassVar[bool] = True  # False: it needs places in a block that are known by name for some architectures only
    recipe: ClassVar[Literal["gradient", "features"]] = "gradient"  # worker/train.py or worker/training/train_on_features.py

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: Any, handler: Any) -> Any:
        """The schema mirrors `app.jobs.request.read_strategy`: settings without a name are those of one strategy, so all others
        need theirs."""
        found = handler.resolve_ref_schema(handler(core_schema))
        if cls.model_fields["name"].default != UNNAMED:
            found["required"] = list(dict.fromkeys(["name", *found.get("required", [])]))
        return found

    @classmethod
    def learning_rate_for(cls, task: str) -> float:
        """Maximum learning rate for a task. For preference pairs it is a tenth of the strategy's own, and a thirtieth where whole
        weights are trained, which for full fine-tuning is the 1e-6 of Rafailov et al. 2023 (appendix B)."""
        return cls.default_learning_rate * (cls.preference_share if OBJECTIVES[task].compares and not OBJECTIVES[task].heads else 1.0)

    # When to take it -------------------------------------------------------------------------------------------------

    def advice_reasons(self, facts: Facts) -> list[Reason]:
        """Reasons for and against it that follow from the data; its cost and `standing` are added in `app/planning/advisor.py`."""
        return [*by_data(self, facts), *by_distance(self, facts), *by_prompts(self, facts)]

    def label_reasons(self, facts: Facts) -> list[Reason]:
        """Reasons that follow from the number and balance of labels."""
        return by_labels(self, facts)

    # What it costs ---------------------------------------------------------------------------------------------------

    @abstractmethod
    def trainable(self, shape: Shape) -> int:
        """Number of the model's trained parameters, without a classifier's head; equal to the count on the real model."""

    def tables(self, shape: Shape) -> int:
        """Of these, parameters of embeddings that an adapter trains in full."""
        return 0

    def head_parameters(self, shape: Shape, labels: int) -> int:
        """Parameters of the head that `head` builds."""
        return shape.hidden * labels + labels

    def trainable_parameters(self, shape: Shape, *, task: str = "generation", labels: int = 0) -> int:
        """All trainable parameters."""
        return self.trainable(shape) + (self.head_parameters(shape, labels) if OBJECTIVES[task].heads else 0)

    def unused(self) -> tuple[str, ...]:
        """Its settings that have no effect with the values of its others."""
        return ()

    def virtual_tokens(self) -> int:
        """Number of virtual tokens: placeholder ids before every sequence, whose embeddings the strategy replaces."""
        return 0

    def trains_in_bf16(self) -> bool:
        """Whether it trains as well in bf16 on a CPU as in float32: its weights are updated in float32, and what it adds to a
        frozen product is added before rounding."""
        return not self.adapter

    def joins(self) -> bool:
        """Whether `worker/modeling/fused_lora.py` computes its layers: one product for layers with the same input, and
        corrections added before rounding."""
        return False

    def memory(self, shape: Shape, *, weight_bytes: int = 4, optimizer_bytes: int = 8) -> Memory:
        """Bytes held while training. `weight_bytes` is the width of a frozen weight; trained ones have 4 bytes, with a gradient
        of 4 and `optimizer_bytes` (two moments) each."""
        trained = self.trainable(shape)
        return Memory(weights=shape.parameters() * weight_bytes + trained * 4, gradients=trained * 4, optimizer=trained * optimizer_bytes)

    def activation_counts(self, shape: Shape) -> Kept:
        """Values that a layer keeps in addition to those that any gradient passing through needs: trained weights in or next to
        the linear layers need their inputs."""
        return Kept(shape.layer_inputs())

    def reaches(self, shape: Shape) -> int:
        """Number of layers, from the top, that gradients pass through."""
        return shape.layers

    def unavailable(self, shape: Shape, *, task: str = "generation", cuda: bool = False) -> str | None:
        """Why this model or machine cannot run it, in a sentence that ends with what to do; None when it can."""
        if not OBJECTIVES[task].classifies and shape.architecture == "encoder":
            return gettext("An encoder writes no text. Choose a dataset with labels, or a decoder.")
        if shape.structure and not self.any_architecture:
            return gettext(
                "Its places in a %(model)s are not known. Choose LoRA, which finds its layers in the model itself.", model=shape.model_type
            )
        refused = dict(shape.structure.refused) if shape.structure else {}
        if self.name in refused:
            return gettext(
                "It was tried when the model was added, and failed: %(reason)s. Choose another method.", reason=refused[self.name]
            )
        return self.unsupported(task)

    @classmethod
    def unsupported(cls, task: str) -> str | None:
        """Why it does not support a task; None where `tasks` lists it, or the objective that trains like it. A recipe without gradients knows
        its own tasks alone."""
        if task in cls.tasks or (OBJECTIVES[task].trains_as in cls.tasks and cls.recipe == "gradient"):
            return None
        return gettext(
            "%(method)s does not support the task %(task)s; it supports %(tasks)s.",
            method=gettext(cls.title),
            task=task,
            tasks=f" {gettext('and')} ".join(cls.tasks),
        )

    @classmethod
    def drawing(cls) -> dict[str, Any]:
        """The drawing of six layers. Keys: `layers` (list of six from "frozen", "trained"), `beside` (bool: small boxes next to
        each layer), `before` (bool: vectors before every layer), `input` (bool: vectors before the input only), `head` (bool: new
        layers on top), `inside` (bool: thin trained stripes inside each layer), `between` (bool: thin trained bars after each
        layer)."""
        return {"layers": ["frozen"] * 6}

    # What it does to a model ------------------------------------------------------------------------------------------

    def rate_factor(self) -> float:
        """Factor on its default learning rate that follows from its settings."""
        return 1.0

    def initialize(self, model: torch.nn.Module, seed: int) -> None:
        """Called once on the base as it was loaded, before `attach`, and before the base is measured."""

    @abstractmethod
    def attach(self, model: torch.nn.Module, *, task: str = "generation", labels: int = 0) -> torch.nn.Module:
        """The model ready to train: `requires_grad` is true for exactly the trained parameters. May wrap the model (as peft
        does).

        For classification the model is the backbone without its head; the head that `head` builds is trained in addition.
        """

    def head(self, hidden: int, labels: int) -> torch.nn.Module:
        """A classifier's head: pooled states (B, hidden) to logits (B, labels)."""
        import torch

        return torch.nn.Linear(hidden, labels)

    @abstractmethod
    def save(self, model: torch.nn.Module, folder: Path) -> None:
        """Write the trained weights as safetensors and JSON into an empty folder. `model` is what `attach` returned."""

    @abstractmethod
    def load(self, model: torch.nn.Module, folder: Path) -> torch.nn.Module:
        """Attach what `save` wrote to a fresh base model; the outputs equal those of the model that was saved.

        The base's own tensors are never written to, since siblings may share them: a changed parameter is a new one.
        """

    def load_blended(self, model: torch.nn.Module, folder: Path, share: float) -> torch.nn.Module:
        """As `load`, but interpolated between the base (`share` 0) and the result (1). Only where `blends` is true."""
        raise TypeError(f"{self.title} cannot be blended with its base: {self.no_blend}")

    def merge(self, model: torch.nn.Module) -> torch.nn.Module:
        """A plain model with the same outputs. Only where `merges` is true."""
        raise TypeError(f"{self.title} cannot be merged into its base.")

    def describe(self, model: torch.nn.Module) -> dict[str, Any]:
        """The contents of `adapter_config.json` for an adapter that peft does not know."""
        return {
            "peft_type": "LUTHIER",
            "base_model_name_or_path": transformer(model).config._name_or_path,
            "strategy": self.model_dump(),
        }

    # How others load it -----------------------------------------------------------------------------------------------

    def loading(self, *, task: str = "generation") -> Loading:
        """Code of the model card: attaches what `save` wrote into `folder` to `model`, a fresh base (for classification its
        backbone without a head). Empty where the base is unchanged, or where the result is a whole model."""
        return Loading()

    def head_code(self, hidden: int, labels: int) -> str:
        """The head that `head` builds, as Python code."""
        return f"torch.nn.Linear({hidden}, {labels})"

    # What it does while training; most need none of it -----------------------------------------------------------------

    def rate_scale(self, parameter: str) -> float:
        """Factor on the learning rate of a parameter of this name."""
        return 1.0

    def begin(self, model: torch.nn.Module, total_steps: int) -> None:
        """Called once before the first step, when the number of steps is known."""

    def regulariser(self, model: torch.nn.Module) -> torch.Tensor | None:
        """A term added to the loss of every step, a scalar."""
        return None

    def after_step(self, model: torch.nn.Module, step: int) -> None:
        """Called after optimizer step `step`, counted from 1, while the gradients are still there."""

    def extra_state(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """State of a checkpoint in addition to the trained parameters, so that a resumed run is the same run."""
        return {}

    def restore(self, model: torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
        """Restore what `extra_state` returned."""
