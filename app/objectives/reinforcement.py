"""Reinforcement learning: the model answers prompts several times, a grader scores the answers, and the better ones become more likely."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, NamedTuple

from pydantic import Field

from app.languages import mark
from app.objectives._base import Objective
from app.objectives._drawn import DRAWN_FORMATS, DrawnSettings

Variant = Literal["grpo", "dr_grpo", "dapo", "gspo", "rloo"]


class PolicyLoss(NamedTuple):
    """What a variant of policy optimization changes."""

    baseline: Literal["group", "others"]  # the mean reward of all answers to a prompt, or of the others
    scaled: bool  # advantages are divided by the standard deviation of the group's rewards
    average: Literal["answer", "token", "limit", "sum"]  # over the tokens of an answer, of the step, over the limit, or none
    ratio: Literal["token", "mean", "product"]  # of the probabilities of each token, or of an answer: their geometric mean, or product
    clip: tuple[float, float]
    refills: bool = False  # prompts whose answers all have the same reward are replaced by others


VARIANTS: dict[str, PolicyLoss] = {
    "grpo": PolicyLoss("group", True, "answer", "token", (0.2, 0.2)),
    "dr_grpo": PolicyLoss("group", False, "limit", "token", (0.2, 0.2)),
    "dapo": PolicyLoss("group", True, "token", "token", (0.2, 0.28), refills=True),
    "gspo": PolicyLoss("group", True, "answer", "mean", (3e-4, 4e-4)),
    "rloo": PolicyLoss("others", False, "sum", "product", (0.2, 0.2)),
}
"""GRPO: Shao et al. 2024, https://arxiv.org/abs/2402.03300. Dr. GRPO: Liu et al. 2025, https://arxiv.org/abs/2503.20783. DAPO: Yu et al. 2025,
https://arxiv.org/abs/2503.14476. GSPO: Zheng et al. 2025, https://arxiv.org/abs/2507.18071. RLOO: Ahmadian et al. 2024,
https://arxiv.org/abs/2402.14740."""


class ReinforcementSettings(DrawnSettings):
    """Settings of reinforcement. The descriptions are the help of the form."""

    grader: dict[str, Any] = Field(
        default_factory=dict,
        description=mark("The reward: a grader, whose score from 0 to 1 is raised. A request may name a saved one by its id."),
        json_schema_extra={"basic": True, "type": ["object", "string"]},
    )
    variant: Variant = Field(
        "grpo",
        description=mark(
            "GRPO compares the answers to one prompt. Dr. GRPO removes its preference for long wrong answers and for easy prompts; DAPO "
            "replaces prompts that teach nothing; GSPO weighs whole answers; RLOO compares each answer with the mean of the others."
        ),
        json_schema_extra={"basic": True},
    )
    updates_per_batch: int = Field(
        1,
        ge=1,
        le=32,
        description=mark(
            "Optimizer steps on each batch of answers (μ in the paper of GRPO). Above 1 less is drawn for as many steps; the later ones "
            "train on answers of older weights, and the clip bounds how far each may move."
        ),
    )
    max_turns: int = Field(
        1,
        ge=1,
        le=16,
        description=mark(
            "Answers of the model in one conversation. Above 1 its tool calls are answered by simulated tools, and it goes on from the "
            "results, which are not trained."
        ),
    )
    tool_source: str = Field(
        "",
        max_length=64 << 10,
        title=mark("Simulated tools"),
        description=mark(
            "Python that defines call(name, arguments, item), whose return value is a tool's result, run as Python graders are; empty: the "
            "results in the column tool_results of the row, a list of name, arguments and result."
        ),
        json_schema_extra={"rows": 4},
    )
    sampler: Literal["worker", "server"] = Field(
        "worker",
        title=mark("Answers are drawn by"),
        description=mark(
            "The worker that trains, or the server (vLLM) that answers for the base model and loads the adapter at each step. A job on a "
            "server that is resumed may draw other answers."
        ),
    )
    kl: float = Field(
        0.0,
        ge=0,
        le=10,
        title=mark("KL penalty"),
        description=mark(
            "KL penalty β against the base model: higher stays closer to it. Above 0 each step reads its answers with the adapter off."
        ),
    )
    max_kl: float | None = Field(
        None,
        gt=0,
        le=100,
        title=mark("Stop above this KL divergence"),
        description=mark(
            "The job stops where the mean divergence from the base over three steps is above this, in nats per token; empty for no bound."
        ),
    )
    stop_when_parted: bool = Field(
        True,
        title=mark("Stop when graders part"),
        description=mark(
            "Stop where the reward rises while the first of the job's graders falls, beyond the 95% interval of the paired difference, at "
            "two evaluations in a row."
        ),
    )
    clip_low: float | None = Field(
        None, gt=0, lt=1, description=mark("How far below 1 the ratio of an answer's probabilities counts; empty: the variant's.")
    )
    clip_high: float | None = Field(
        None, gt=0, le=10, description=mark("How far above 1 the ratio of an answer's probabilities counts; empty: the variant's.")
    )
    check_prompts: int = Field(
        16,
        ge=0,
        le=512,
        description=mark(
            "Prompts that the base model answers before training starts, to see whether the reward can teach, and four times as many where "
            "no answers to them differ; 0 for no check."
        ),
    )
    despite_check: bool = Field(
        False, title=mark("Train despite the check"), description=mark("Train although the check finds no difference between rewards.")
    )

    @property
    def updates(self) -> int:
        return self.updates_per_batch

    @property
    def turns(self) -> int:
        return self.max_turns

    @property
    def reads_base(self) -> bool:
        """Whether each step reads its answers with the base too."""
        return bool(self.kl or self.max_kl)

    @property
    def loss(self) -> PolicyLoss:
        chosen = VARIANTS[self.variant]
        low, high = chosen.clip
        return chosen._replace(clip=(self.clip_low or low, self.clip_high or high))


class Reinforcement(Objective):
    name: ClassVar = "reinforcement"
    title: ClassVar = mark("Reinforcement learning")
    summary: ClassVar = mark(
        "Reinforcement learning (GRPO) lets the model answer prompts several times, and makes the answers that a grader prefers more likely."
    )
    paper: ClassVar = ("Shao et al. 2024, DeepSeekMath (GRPO)", "https://arxiv.org/abs/2402.03300")
    place: ClassVar = 40
    method: ClassVar = "reinforcement"
    formats: ClassVar = DRAWN_FORMATS
    trains_as: ClassVar = "generation"
    draws: ClassVar = True
    rewards: ClassVar = True
    settings: ClassVar = ReinforcementSettings
    graded: ClassVar = True
    metrics: ClassVar = ("reward", "loss")
    across_models: ClassVar = ("reward",)
    loss_unit: ClassVar = mark("1 less the mean reward")
    loss_per: ClassVar = "prompt"
