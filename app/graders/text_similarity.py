"""How similar the answer is to a reference."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import Field

from app.graders._base import JSON, EmbedAsk, GradedSample, GradeError, Grader, Result, Steps
from app.graders._templates import Template, fill
from app.kit.humanize import human_number
from app.kit.similarity import BY_WORDS, MAX_COMPARED, cosine, fuzzy_match, words_of
from app.languages import gettext, mark

Metric = Literal["fuzzy_match", "bleu", "gleu", "meteor", "rouge_1", "rouge_2", "rouge_3", "rouge_4", "rouge_5", "rouge_l", "cosine"]


class TextSimilarityGrader(Grader):
    place: ClassVar = 20
    title: ClassVar = mark("Text similarity")
    summary: ClassVar = mark("How similar the answer is to the reference, by its words or by its meaning.")
    example: ClassVar = {"input": "{{sample.output_text}}", "reference": "{{item.reference}}", "evaluation_metric": "rouge_l"}

    type: Literal["text_similarity"]
    input: Template = Field(description=mark("The text that is graded."))
    reference: Template = Field(description=mark("The text that it is compared with."))
    evaluation_metric: Metric = Field(description=mark("How the two are compared; cosine compares their embeddings."))
    model: str | None = Field(
        None, max_length=300, description=mark("The embedding model of cosine; empty takes the newest of the project.")
    )

    def models(self) -> Iterator[str | None]:
        if self.evaluation_metric == "cosine":
            yield self.model

    def steps(self, sample: GradedSample, item: JSON) -> Steps:
        text, reference = fill(self.input, sample, item), fill(self.reference, sample, item)
        if self.evaluation_metric == "cosine":
            return (yield from self._cosine(text, reference))
        if (longest := max(len(text), len(reference))) > MAX_COMPARED:
            said = gettext(
                "A text has %(size)s characters; %(most)s are compared at most.",
                size=human_number(longest),
                most=human_number(MAX_COMPARED),
            )
            raise GradeError("truncated_observation_error", said)
        if self.evaluation_metric == "fuzzy_match":
            return Result(fuzzy_match(text, reference))
        return Result(BY_WORDS[self.evaluation_metric](words_of(text), words_of(reference)))

    def _cosine(self, text: str, reference: str) -> Steps:
        if not text.strip() or not reference.strip():
            return Result(float(text.strip() == reference.strip()))  # an empty text has no embedding
        reply = yield EmbedAsk(self.model, (text, reference))
        return Result(cosine(*reply.vectors), tokens={reply.model: reply.tokens})
