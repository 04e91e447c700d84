"""A generator that reads passages: it computes likelihoods of answers and searches answers.

It knows nothing of retrieval: the caller passes passages and scores. `rag_model.py` retrieves them; pretraining takes
them from its question file.

Shapes: B questions, K passages per question, S context tokens, T answer tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from rag_core.corpus.passages import Passage
from rag_core.cpu.heap import return_freed_blocks
from rag_core.decoding import Hypothesis, decode_rag_sequence, decode_rag_token
from rag_core.embeddings.text_encoder import Precision, autocast
from rag_core.errors import ConfigError
from rag_core.generators.decoding_mode import decoding_mode
from rag_core.generators.kinds import as_generator, check_generates
from rag_core.generators.limits import refuse_long_search
from rag_core.model.adapters.adapter_files import GeneratorType, is_adapter_folder, load_adapted, write_adapters
from rag_core.model.adapters.lora import base_of, remember_fingerprint
from rag_core.model.surface import SurfaceReader
from rag_core.pretrained.model_source import (
    load_config,
    load_tokenizer,
    load_weights,
    quiet_transformers,
    resolve_model_source,
)
from rag_core.pretrained.rounded_weights import round_weights, stored_type
from rag_core.reading.contexts import ContextCount, answer_labels, assemble_contexts
from rag_core.reading.generator_limits import fitting_prompt, pad_with_an_end, refuse_tokenizer
from rag_core.reading.likelihood import Variant, rag_nll
from rag_core.reading.prompt import PromptConfig
from rag_core.reading.rendering import end_of_answers, rendered_for


class DecodingConfig(BaseModel):
    """How answers are searched."""

    model_config = ConfigDict(extra="forbid")

    num_beams: int = Field(4, ge=1)
    max_new_tokens: int = Field(32, ge=1, description="longest answer, end token included")
    mode: Literal["thorough", "fast"] = Field(
        "thorough",
        description="RAG-Sequence: score answers under every passage, or only where its beam found them",
    )
    length_penalty: float = Field(0.0, description="beams rank by log_prob / length ** length_penalty")
    early_stopping: bool | Literal["never"] = Field(
        False, description="when a beam is done; as in Transformers' generation config"
    )
    num_return_sequences: int = Field(3, ge=1, description="the answer and its runners-up")
    batch_size: int = Field(16, ge=1, description="questions decoded at once")
    precision: Precision = "auto"


@dataclass(frozen=True, slots=True)
class Candidate:
    """An answer's text and its log-probability in nats (end token included) under the mixture."""

    text: str
    log_prob: float


@dataclass(frozen=True, slots=True)
class ReadPassage:
    """A passage that was read, with its prior p(z|q) and its posterior p(z|q,a).

    In RAG-Token every token has its own posterior; here it is their mean over the answer's tokens.
    """

    passage: Passage
    prior: float
    posterior: float


@dataclass(frozen=True, slots=True)
class Answer:
    """The best answer to a question, all candidates (best first, starting with the answer), and the passages read."""

    text: str
    log_prob: float
    candidates: tuple[Candidate, ...]
    passages: tuple[ReadPassage, ...]


class GeneratorReader:
    """A generator with its tokenizer and prompt. `count` counts the contexts that were read. `end` is the token
    that answers are trained to end with, one of `ends`, which end them in decoding.

    The prompt is rendered for the generator (`rendering.py`), and default lengths are lowered to its positions. The
    token that ends a chat's answers becomes an end token of the generator.

    Raises:
        ConfigError: the generator has too few positions for lengths that the prompt sets explicitly, or its tokenizer
            cannot render the prompt's chat.
    """

    def __init__(self, generator: nn.Module, tokenizer: Any, prompt: PromptConfig) -> None:
        self.generator = generator
        self.tokenizer = tokenizer
        prompt = rendered_for(generator, tokenizer, prompt)
        chat_end = end_of_answers(generator, tokenizer, prompt)
        self.prompt = fitting_prompt(generator, prompt)
        self.count = ContextCount()
        self._surface = SurfaceReader(tokenizer)
        # Training must end answers with a token that ends them in decoding: the generator's, if the two differ.
        ends = as_generator(generator).tokens.ends
        own_end = tokenizer.eos_token_id if tokenizer.eos_token_id in ends else ends[0]
        self.ends, self.end = ends, own_end if chat_end is None else chat_end

    @property
    def device(self) -> torch.device:
        return next(self.generator.parameters()).device

    def save_pretrained(self, folder: Path) -> None:
        """Write weights (safetensors; of adapters, if there are any) and tokenizer; `load_generator` reads the folder."""
        with quiet_transformers():
            if base_of(self.generator):
                write_adapters(self.generator, folder)
            else:
                self.generator.save_pretrained(folder)  # type: ignore[operator]
            self.tokenizer.save_pretrained(folder)

    @contextlib.contextmanager
    def counting(self) -> Iterator[ContextCount]:
        """Count the contexts that are read inside the block separately."""
        outside, self.count = self.count, ContextCount()
        try:
            yield self.count
        finally:
            self.count = outside

    def check_decoding(self, decoding: DecodingConfig) -> None:
        """Raise ConfigError if the generator has too few positions for the longest answers that `decoding` allows."""
        context = self.prompt.max_context_tokens
        refuse_long_search(as_generator(self.generator), decoding.max_new_tokens, context_tokens=context)

    @contextlib.contextmanager
    def many_batches(self, decoding: DecodingConfig) -> Iterator[None]:
        """Wrap several `answer_from` calls, so that the generator's weights are packed once for all of them."""
        with autocast(self.device, decoding.precision), decoding_mode(self.generator):
            yield

    def nll(
        self,
        questions: Sequence[str],
        passages_BK: Sequence[Sequence[Passage]],
        doc_scores_BK: torch.Tensor,
        answers: Sequence[str],
        variant: Variant,
    ) -> torch.Tensor:
        """Return −log p(answer | question) for these passages and scores: nll_B in nats, summed over tokens."""
        contexts = self._contexts(questions, passages_BK)
        limit, rendered = self.prompt.max_answer_tokens, self.prompt.rendered
        labels_BT = answer_labels(self.tokenizer, answers, limit, self.device, end=self.end, rendered=rendered)
        return rag_nll(self.generator, *contexts, doc_scores_BK, labels_BT, variant=variant)

    def answer_from(
        self,
        questions: Sequence[str],
        passages_BK: Sequence[Sequence[Passage]],
        doc_scores_BK: torch.Tensor,
        *,
        variant: Variant,
        decoding: DecodingConfig,
    ) -> list[Answer]:
        """Answer one batch of questions from passages and their scores, shape (B, K)."""
        contexts = self._contexts(questions, passages_BK)
        options: dict[str, Any] = {
            "num_beams": decoding.num_beams,
            "max_new_tokens": decoding.max_new_tokens,
            "length_penalty": decoding.length_penalty,
            "early_stopping": decoding.early_stopping,
            "num_return_sequences": min(decoding.num_return_sequences, decoding.num_beams),
        }
        with autocast(self.device, decoding.precision):
            if variant == "sequence":
                hypotheses_B = decode_rag_sequence(
                    self.generator, *contexts, doc_scores_BK, mode=decoding.mode, **options
                )
            else:
                hypotheses_B = decode_rag_token(self.generator, *contexts, doc_scores_BK, **options)
        prior_BK = torch.softmax(doc_scores_BK.double(), dim=-1).cpu().numpy()
        return [
            self._to_answer(hypotheses, passages_K, prior_K)
            for hypotheses, passages_K, prior_K in zip(hypotheses_B, passages_BK, prior_BK, strict=True)
        ]

    def _contexts(
        self, questions: Sequence[str], passages_BK: Sequence[Sequence[Passage]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        contexts = assemble_contexts(self.tokenizer, self.prompt, questions, passages_BK, self.device)
        self.count.contexts += sum(len(passages_K) for passages_K in passages_BK)
        self.count.contexts_cut += contexts.cut
        return contexts.input_ids_BKS, contexts.attention_mask_BKS

    def _to_answer(self, hypotheses: list[Hypothesis], passages_K: Sequence[Passage], prior_K: np.ndarray) -> Answer:
        best = hypotheses[0]
        log_posterior = best.doc_log_posterior.double()
        if log_posterior.dim() == 2:
            posterior_K = log_posterior.exp().mean(0).numpy() if len(log_posterior) else prior_K
        else:
            posterior_K = log_posterior.exp().numpy()
        order = np.argsort(-posterior_K, kind="stable")
        read_texts = [passages_K[place].text for place in order]
        candidates = tuple(
            Candidate(self._surface(hypothesis.token_ids, read_texts), hypothesis.log_prob) for hypothesis in hypotheses
        )
        return Answer(
            text=candidates[0].text,
            log_prob=best.log_prob,
            candidates=candidates,
            passages=tuple(
                ReadPassage(passage, float(prior), float(posterior))
                for passage, prior, posterior in zip(passages_K, prior_K, posterior_K, strict=True)
            ),
        )


def load_generator(
    name_or_folder: str | Path, *, trust_remote_code: bool = False, dtype: GeneratorType | None = None
) -> tuple[nn.Module, Any]:
    """Load a generator in eval mode and its tokenizer; arguments as in `TextEncoder.from_pretrained`.

    Args:
        name_or_folder: a model, or adapters that name their base (`adapters/adapter_files.py`).
        trust_remote_code: run code that comes with the model.
        dtype: bfloat16 holds frozen matrices in it (`round_weights`); default: as adapters were trained, else float32.

    Raises:
        ConfigError: the model cannot be read, writes no text, or its tokenizer belongs to another model; or,
            for adapters, as in `load_adapted`.

    Warns:
        ModelNotice: the tokenizer has no padding token, so the end token pads.
    """
    source = resolve_model_source(name_or_folder, trust_remote_code=trust_remote_code)

    def load_base(base: str, base_dtype: GeneratorType) -> nn.Module:
        folder = resolve_model_source(base, trust_remote_code=trust_remote_code)
        return _load_whole(base, folder, base_dtype, trust_remote_code)

    if is_adapter_folder(source):
        model, tokenizer_source = load_adapted(Path(source), load_base, dtype)
        tokenizer_source = resolve_model_source(tokenizer_source, trust_remote_code=trust_remote_code)
    else:
        model = _load_whole(str(name_or_folder), source, dtype or "float32", trust_remote_code)
        tokenizer_source = source
    tokenizer = load_tokenizer(tokenizer_source, trust_remote_code=trust_remote_code)
    if not model.config.is_encoder_decoder:
        pad_with_an_end(tokenizer, str(name_or_folder))
    refuse_tokenizer(model, tokenizer, str(name_or_folder))
    return model.eval(), tokenizer


def _load_whole(name_or_folder: str, source: str, dtype: GeneratorType, trust_remote_code: bool) -> nn.Module:
    """Load a model that has all its weights from the folder `source`."""
    if is_adapter_folder(source):
        raise ConfigError(
            f"{name_or_folder} holds adapters, too; adapters of adapters cannot be loaded. Merge it with `rag export`."
        )
    config = load_config(source, trust_remote_code=trust_remote_code)
    check_generates(config, name_or_folder)
    options: dict[str, Any] = {"dtype": stored_type(source) if dtype == "bfloat16" else torch.float32}
    load = (AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM).from_pretrained
    model = load_weights(load, source, may_lack="encoder.pooler.", trust_remote_code=trust_remote_code, **options)
    model = without_unused_pooler(model)
    if dtype == "bfloat16":
        remember_fingerprint(model)
        round_weights(model)
        return_freed_blocks()
    return model


def without_unused_pooler(generator: Any) -> Any:
    """Remove the encoder's pooler from an EncoderDecoderModel, and return the generator.

    The model's output does not use the pooler. Loading gives it random weights, so every load would have another
    fingerprint. It gets no gradient either, which DDP does not allow.
    """
    if getattr(getattr(generator, "encoder", None), "pooler", None) is not None:
        generator.encoder.pooler = None
    return generator
