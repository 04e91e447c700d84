"""Make a generator from a text encoder, for cases without a pretrained seq2seq model, and teach it to copy and read.

An `EncoderDecoderModel` (Rothe et al. 2020, arXiv 1907.12461) takes both sides from the encoder. The decoder keeps the
first few layers, and its cross-attention starts with the weights of its self-attention. Pretraining has two phases.
First the model writes out the passages it reads, which teaches the cross-attention to copy in a few hundred steps. Then
it answers questions over the passage that holds the answer. `docs/log.md` has the measured benefit of each step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from transformers import EncoderDecoderModel

from rag_core.corpus.passages import Passage
from rag_core.errors import ConfigError, InputError
from rag_core.evaluation.evaluation import has_text_answers
from rag_core.evaluation.metrics import Match
from rag_core.model.reader import GeneratorReader
from rag_core.pretrained.model_source import (
    load_config,
    load_from_source,
    load_tokenizer,
    resolve_model_source,
    weights_options,
)
from rag_core.questions.questions import Question
from rag_core.reading.contexts import end_token_id
from rag_core.reading.prompt import PromptConfig
from rag_core.training.loop import NOT_IN_KEY, OptimizerConfig
from rag_core.training.objectives import Reading, ReadingExample

# Parameters that are not pretrained: the cross-attention and the head that predicts tokens.
FRESH = ("crossattention", "cls.predictions")


class PretrainConfig(BaseModel):
    """Settings of pretraining. The defaults are a recipe that was measured to work on two cores."""

    model_config = ConfigDict(extra="forbid")

    encoder: str = Field(description="BERT-like text encoder that both sides start from")
    trust_remote_code: bool = Field(False, description="run code that comes with the encoder")
    encoder_layers: int = Field(6, ge=1, description="layers kept of the encoder, from the first")
    decoder_layers: int = Field(2, ge=1, description="layers kept for the decoder, from the first")
    copy_steps: int = Field(250, ge=0, description="steps of writing out the passage that is read")
    learning_rate: float = Field(2e-4, gt=0)
    fresh_factor: float = Field(4.0, gt=0, description="learning rate of fresh parameters, as a multiple")
    dropout: float = Field(0.0, ge=0, lt=1)
    match: Match = Field("words", description="how dev answers are compared: words (published rule) or characters")
    prompt: PromptConfig = Field(default_factory=PromptConfig)
    optimizer: OptimizerConfig = Field(
        default_factory=lambda: OptimizerConfig(steps=550, batch_size=16, warmup_steps=20)
    )

    def decisive(self) -> dict[str, Any]:
        """The settings that affect the result, apart from the encoder's weights. `match` is included only if it differs
        from the published rule."""
        undecisive: dict[str, Any] = {"encoder": True, "trust_remote_code": True, "optimizer": NOT_IN_KEY}
        return self.model_dump(mode="json", exclude=undecisive | ({"match": True} if self.match == "words" else {}))


def build_generator(config: PretrainConfig) -> tuple[Any, Any]:
    """Build an `EncoderDecoderModel` from an encoder's weights; return it and its tokenizer.

    Raises:
        ConfigError: the encoder cannot be loaded, is not a BERT, or has fewer layers than the settings keep.
    """
    source = resolve_model_source(config.encoder, trust_remote_code=config.trust_remote_code)
    encoder_config = load_config(source, trust_remote_code=config.trust_remote_code)
    if encoder_config.model_type != "bert":
        raise ConfigError(
            f"{config.encoder} is of type {encoder_config.model_type!r}; a generator can only be made from a BERT "
            "(such as MiniLM)."
        )
    requested = max(config.encoder_layers, config.decoder_layers)
    if requested > encoder_config.num_hidden_layers:
        # Transformers would fill the missing layers with random weights without a warning.
        raise ConfigError(
            f"{config.encoder} has {encoder_config.num_hidden_layers} layers, but the settings keep {requested}. "
            "Lower encoder_layers and decoder_layers."
        )
    tokenizer = load_tokenizer(source, trust_remote_code=config.trust_remote_code)
    dropout = {"hidden_dropout_prob": config.dropout, "attention_probs_dropout_prob": config.dropout}

    def load(name: str, **options: Any) -> Any:
        options.pop("trust_remote_code")  # BERT's code is in Transformers
        return EncoderDecoderModel.from_encoder_decoder_pretrained(name, name, **options)

    sides: dict[str, Any] = {
        f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in dropout.items()
    }
    weights = weights_options(source)
    sides |= {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in weights.items()}
    layers: dict[str, Any] = {
        "encoder_num_hidden_layers": config.encoder_layers,
        "decoder_num_hidden_layers": config.decoder_layers,
    }
    model: Any = load_from_source(load, source, **sides, **layers, encoder_add_pooling_layer=False)
    _start_cross_attention_from_self_attention(model)
    for settings in (model.config, model.generation_config):
        settings.decoder_start_token_id = tokenizer.cls_token_id
        settings.eos_token_id = end_token_id(tokenizer)
        settings.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def reading_objective(reader: GeneratorReader, config: PretrainConfig) -> Reading:
    """Make the objective of pretraining, with the learning rates of known and fresh parameters."""
    return Reading(reader, rate=config.learning_rate, fresh=FRESH, fresh_factor=config.fresh_factor)


def copying_examples(passages: Sequence[Passage]) -> list[ReadingExample]:
    """Make examples in which the generator writes out the passage it reads."""
    return [ReadingExample("", passage, passage.text) for passage in passages]


def reading_examples(questions: Sequence[Question], passages: Sequence[Passage]) -> list[ReadingExample]:
    """Pair each question with the passage that holds the answer: its first gold passage that is among `passages`.

    Raises:
        InputError: no question names a gold passage that is among `passages`.
    """
    by_id = {passage.id: passage for passage in passages}
    examples = [
        ReadingExample(question.question, by_id[gold], question.answers[0])
        for question in questions
        for gold in _first_known(question, by_id)
        if has_text_answers(question)
    ]
    if not examples:
        raise InputError(
            "None of the questions names a gold passage of this corpus (field gold_passage_ids), so the generator "
            "cannot learn to read. Give questions made from this corpus."
        )
    return examples


def read_pairs(questions: Sequence[Question], passages: Sequence[Passage]) -> list[tuple[Question, Passage]]:
    """Pair each question with its first gold passage that is among `passages`; leave out questions without one."""
    by_id = {passage.id: passage for passage in passages}
    return [(question, by_id[gold]) for question in questions for gold in _first_known(question, by_id)]


def _first_known(question: Question, by_id: Mapping[str, Passage]) -> list[str]:
    """At most one gold passage id. Some are not in `by_id`: KILT also names headings, and a corpus may be partial."""
    return [gold for gold in question.gold_passage_ids if gold in by_id][:1]


def copy_then_read(
    copying: Sequence[ReadingExample], step: int, batch: Sequence[Any], config: PretrainConfig
) -> Sequence[ReadingExample]:
    """Return the examples of a step: passages to copy while `step` ≤ `copy_steps`, then the batch of questions."""
    if step > config.copy_steps:
        return batch
    rows = np.random.default_rng([config.optimizer.seed, 1, step]).choice(len(copying), len(batch))
    return [copying[row] for row in rows]


def _start_cross_attention_from_self_attention(model: Any) -> None:
    for layer in model.decoder.bert.encoder.layer:
        layer.crossattention.load_state_dict(layer.attention.state_dict())
