"""The training objectives: end to end through retrieval, or, to prepare a generator, copying and reading one passage.

An objective is a module whose call returns nll_B for a list of examples, and whose parameter groups have their own
learning rates. Retrieval happens inside the forward pass with the current question encoder, so one pass of that encoder
serves the search and the gradient.

Shapes: B questions, K passages per question, S context tokens, T answer tokens, D embedding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from rag_core.corpus.passages import Passage
from rag_core.cpu.training_kernels import training_kernels
from rag_core.index.retriever import Retriever
from rag_core.model.rag_model import RagModel
from rag_core.model.reader import GeneratorReader
from rag_core.pretrained.model_source import quiet_transformers
from rag_core.questions.questions import Question
from rag_core.reading.likelihood import Variant
from rag_core.training.recomputation import recompute_layers


class EndToEndRates(BaseModel):
    """Learning rates of the two trained parts."""

    model_config = ConfigDict(extra="forbid")

    question_encoder: float = Field(3e-5, ge=0, description="0 leaves the question encoder as it is")
    generator: float = Field(3e-5, ge=0, description="0 leaves the generator as it is")


class EndToEnd(nn.Module):
    """−log p(answer | question), marginalised over the K passages that the current question encoder finds.

    No label says which passage is right. The gradient reaches the question encoder through p(z|q) (Lewis et al. 2020,
    section 2.4); the passages' vectors are constants. If a question has several answers, the first is the target.
    """

    # The search refuses question vectors that are not finite, and the likelihood is finite for finite logits.
    loss_comes_from = "the generator's logits"

    def __init__(
        self,
        model: RagModel,
        index: Retriever,
        variant: Variant,
        rates: EndToEndRates,
        *,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        model.check_index(index)
        index.check_num_docs(model.settings.num_docs)
        self.model = model
        self._index = index
        self._variant = variant
        self._rates = rates
        for part, rate in self._parts():
            if rate == 0:
                part.requires_grad_(False)
        self._recomputes = gradient_checkpointing and rates.generator > 0
        if self._recomputes:
            recompute_layers(model.generator)

    def forward(self, examples: Sequence[Question]) -> torch.Tensor:
        """Return nll_B of the examples' answers, in nats."""
        questions = [example.question for example in examples]
        question_vectors_BD = self.model.question_encoder.embed(questions)
        matches = self._index.search(question_vectors_BD.detach().float().cpu().numpy(), self.model.settings.num_docs)
        vectors_BKD = torch.from_numpy(matches.vectors_BKD).to(question_vectors_BD.device)
        with torch.autocast(question_vectors_BD.device.type, enabled=False):
            doc_scores_BK = self.model.doc_scores(question_vectors_BD.float(), vectors_BKD)
        passages_BK = self._index.passages_of(matches.rows_BK)
        answers = [example.answers[0] for example in examples]
        return self.model.reader.nll(questions, passages_BK, doc_scores_BK, answers, self._variant)

    @contextmanager
    def until_backward(self) -> Iterator[None]:
        """A block to hold from the forward pass to the end of the backward pass, entered under autocast."""
        if self._recomputes:
            # Transformers would note that layers which are computed again keep no cache; ours keep none in training.
            with training_kernels(self.model.generator), quiet_transformers():
                yield
        else:
            yield

    def train(self, mode: bool = True) -> EndToEnd:
        """Put the trained parts into training mode; a part at rate 0 stays in evaluation mode, without dropout."""
        super().train(mode)
        for part, rate in self._parts():
            part.train(mode and rate > 0)
        return self

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return one group per trained part, with its learning rate."""
        return [{"params": _trainable(part), "lr": rate} for part, rate in self._parts() if rate > 0]

    def _parts(self) -> tuple[tuple[nn.Module, float], ...]:
        return (
            (self.model.question_encoder, self._rates.question_encoder),
            (self.model.generator, self._rates.generator),
        )


@dataclass(frozen=True, slots=True)
class ReadingExample:
    """A passage to read, its question ("" in copying examples), and the target text."""

    question: str
    passage: Passage
    target: str


class Reading(nn.Module):
    """−log p(target | question, passage) with one passage per example. It trains the generator alone.

    Newly initialised parameters (a decoder's cross-attention) learn at a multiple of the base rate.
    """

    loss_comes_from = "the generator's logits"

    def __init__(self, reader: GeneratorReader, *, rate: float, fresh: Sequence[str], fresh_factor: float) -> None:
        super().__init__()
        self.generator = reader.generator
        self._reader = reader
        self._rate, self._fresh, self._fresh_factor = rate, tuple(fresh), fresh_factor

    def forward(self, examples: Sequence[ReadingExample]) -> torch.Tensor:
        """Return nll_B of the examples' targets, in nats."""
        questions = [example.question for example in examples]
        passages_B1 = [[example.passage] for example in examples]
        targets = [example.target for example in examples]
        # With one passage, p(z|q) is 1, and both variants are the plain sequence likelihood.
        doc_scores_B1 = torch.zeros(len(examples), 1, device=self._reader.device)
        return self._reader.nll(questions, passages_B1, doc_scores_B1, targets, "sequence")

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return two groups: pretrained parameters, and fresh ones at their higher rate."""
        named = [(name, weight) for name, weight in self.generator.named_parameters() if weight.requires_grad]
        fresh = [weight for name, weight in named if any(word in name for word in self._fresh)]
        known = [weight for name, weight in named if not any(word in name for word in self._fresh)]
        groups = [{"params": known, "lr": self._rate}, {"params": fresh, "lr": self._rate * self._fresh_factor}]
        return [group for group in groups if group["params"]]


def _trainable(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]
