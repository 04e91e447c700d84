"""A RAG model: a trained question encoder and generator that answer from an index of passages.

Lewis et al. 2020 (arXiv 2005.11401). The document encoder is frozen and not part of the model. The model keeps its
fingerprint, and refuses an index that another encoder made. This module scores and answers. `reader.py` reads passages,
`decoding/` searches answers, `training/` trains the model.

Shapes: B questions, K passages per question, D embedding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from rag_core.embeddings.text_encoder import Pooling, TextEncoder, fingerprint_of_weights
from rag_core.errors import ArtifactError, ConfigError
from rag_core.index.retriever import Retriever
from rag_core.model.adapters.adapter_files import GeneratorType
from rag_core.model.adapters.merging import write_merged
from rag_core.model.reader import Answer, DecodingConfig, GeneratorReader, load_generator
from rag_core.model.settings import KIND, SETTINGS_FILE, ModelConfig, ModelSettings
from rag_core.pretrained.model_source import quiet_transformers
from rag_core.reading.generator_limits import within_positions
from rag_core.reading.likelihood import Variant
from rag_core.storage.artifact import local_copy, open_artifact, publish


def load_question_encoder(config: ModelConfig) -> TextEncoder:
    """Load the question encoder that a model starts from; errors as in `TextEncoder.from_pretrained`."""
    return TextEncoder.from_pretrained(
        config.question_encoder,
        side="question",
        pooling=config.pooling,
        prompt=config.question_prompt,
        trust_remote_code=config.trust_remote_code,
    )


class RagModel(nn.Module):
    """Question encoder and generator with both tokenizers."""

    def __init__(
        self, question_encoder: TextEncoder, generator: nn.Module, tokenizer: Any, settings: ModelSettings
    ) -> None:
        super().__init__()
        if question_encoder.prompt != question_encoder.settings.prompt_for("question"):
            question_encoder = question_encoder.for_questions()
        self.question_encoder = question_encoder
        self.generator = generator
        self.generator_tokenizer = tokenizer
        self.reader = GeneratorReader(generator, tokenizer, settings.prompt)
        self.settings = settings
        if self.reader.prompt != settings.prompt:
            self.settings = settings.model_copy(update={"prompt": self.reader.prompt})

    @classmethod
    def from_parts(cls, config: ModelConfig) -> RagModel:
        """Put a model together from a question encoder and a generator.

        Raises:
            ConfigError: a part cannot be loaded, the generator is not a seq2seq model, or it has too few positions for
                the lengths that the prompt sets.
        """
        trust = config.trust_remote_code
        question_encoder = load_question_encoder(config)
        generator, tokenizer = load_generator(config.generator, trust_remote_code=trust, dtype=config.generator_dtype)
        settings = ModelSettings(score_scale=config.score_scale, num_docs=config.num_docs, prompt=config.prompt)
        return cls(question_encoder, generator, tokenizer, settings)

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, trust_remote_code: bool = False) -> RagModel:
        """Load a folder written by `save_pretrained`.

        Args:
            folder: the artifact.
            trust_remote_code: run code that was saved with a part of the model.

        Raises:
            ArtifactError: the folder is not a RAG model, or it is damaged.
            ConfigError: a part cannot be loaded, or needs `trust_remote_code`.
        """
        folder = local_copy(Path(folder))
        open_artifact(folder, KIND)
        try:
            settings = ModelSettings.model_validate_json((folder / SETTINGS_FILE).read_bytes())
        except (ValidationError, OSError) as error:
            reason = str(error).splitlines()[0]
            raise ArtifactError(
                f"{folder / SETTINGS_FILE} cannot be read ({reason}). Train the model again, or copy it again."
            ) from error
        trust: dict[str, Any] = {"trust_remote_code": trust_remote_code}
        question_encoder = TextEncoder.from_pretrained(folder / "question_encoder", side="question", **trust)
        generator, tokenizer = load_generator(folder / "generator", **trust)
        # Older releases saved prompts longer than the positions. Contexts that fit are read as before, longer ones cut.
        settings.prompt = within_positions(generator, settings.prompt)
        return cls(question_encoder, generator, tokenizer, settings).eval()

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        config: dict[str, Any] | None = None,
        made_from: dict[str, str] | None = None,
        details: dict[str, Any] | None = None,
    ) -> None:
        """Publish the model as a folder (weights in safetensors) atomically; this replaces an older model there."""
        with publish(Path(folder), KIND, config=config, made_from=made_from) as draft:
            self.write_files(draft.folder)
            draft.details = details or {}

    def export(self, folder: str | Path, *, dtype: GeneratorType = "float32", source: str = "") -> None:
        """Publish the model with its adapters merged: its parts are plain Transformers folders that need no base.

        Args:
            folder: as for `save_pretrained`.
            dtype: type of the generator's weights.
            source: where the model was loaded from, for the manifest.
        """
        made_from = {"model": self.fingerprint()}
        with publish(Path(folder), KIND, config={"generator_dtype": dtype}, made_from=made_from) as draft:
            self._write_all_but_generator(draft.folder)
            with quiet_transformers():
                write_merged(self.generator, draft.folder / "generator", getattr(torch, dtype))
                self.generator_tokenizer.save_pretrained(draft.folder / "generator")
            draft.details = {"exported_from": source}

    @classmethod
    def from_hf_rag(
        cls, folder_or_hub_name: str | Path, *, pooling: Pooling | None = None, trust_remote_code: bool = False
    ) -> RagModel:
        """Read a Hugging Face RAG checkpoint; arguments and errors as in `hf_rag_reading.read_hf_rag`."""
        from rag_core.model.hf_rag_reading import read_hf_rag

        return cls(*read_hf_rag(folder_or_hub_name, pooling=pooling, trust_remote_code=trust_remote_code)).eval()

    def to_hf_rag(self, folder: str | Path, *, variant: Variant | None = None) -> None:
        """Write a Hugging Face RAG checkpoint; arguments and errors as in `hf_rag_writing.write_hf_rag`."""
        from rag_core.model.hf_rag_writing import write_hf_rag

        write_hf_rag(self, folder, variant=variant)

    def write_files(self, folder: Path) -> None:
        """Write the model's files into a folder, without a manifest."""
        self._write_all_but_generator(folder)
        self.reader.save_pretrained(folder / "generator")

    def _write_all_but_generator(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.question_encoder.save_pretrained(folder / "question_encoder")
        (folder / SETTINGS_FILE).write_text(self.settings.model_dump_json(indent=2) + "\n", encoding="utf-8")

    def fingerprint(self) -> str:
        """SHA-256 of all weights. It identifies the start of a training run, whatever the folders are called."""
        digest = hashlib.sha256(self.question_encoder.fingerprint().encode())
        digest.update(fingerprint_of_weights(self.generator).encode())
        return digest.hexdigest()

    @property
    def device(self) -> torch.device:
        return self.question_encoder.device

    def doc_scores(self, question_vectors_BD: torch.Tensor, vectors_BKD: torch.Tensor) -> torch.Tensor:
        """doc_scores_BK float32: score_scale × ⟨question, passage⟩, differentiable in the question vectors."""
        return self.settings.score_scale * torch.einsum("bd,bkd->bk", question_vectors_BD, vectors_BKD)

    def answer(
        self,
        questions: Sequence[str],
        index: Retriever,
        *,
        variant: Variant | None = None,
        num_docs: int | None = None,
        decoding: DecodingConfig | None = None,
        on_progress: Callable[[int], None] | None = None,
    ) -> list[Answer]:
        """Retrieve and answer.

        Args:
            questions: any number; they are decoded `decoding.batch_size` at a time.
            index: the passages to read.
            variant: "sequence" or "token"; default: what the model was trained as.
            num_docs: K; default: the model's setting.
            decoding: beam settings.
            on_progress: called with the number of questions done after each batch.

        Raises:
            ConfigError: no variant is known, K is larger than the corpus, the index has another width, or the generator
                has too few positions.
            ArtifactError: the index comes from another document encoder than the model was trained with.
        """
        self.check_index(index)
        variant, decoding = self.variant_or(variant), decoding or DecodingConfig()
        self.reader.check_decoding(decoding)
        answers: list[Answer] = []
        with self.reader.many_batches(decoding):
            for batch in batches_of(questions, decoding.batch_size):
                vectors_BD = self.question_encoder.embed(batch)
                matches = index.search(vectors_BD.float().cpu().numpy(), num_docs or self.settings.num_docs)
                scores_BK = self.settings.score_scale * torch.from_numpy(matches.scores_BK).to(self.device)
                passages_BK = index.passages_of(matches.rows_BK)
                answers += self.reader.answer_from(batch, passages_BK, scores_BK, variant=variant, decoding=decoding)
                if on_progress:
                    on_progress(len(batch))
        return answers

    def check_index(self, index: Retriever) -> None:
        """Raise unless the index has the model's vector width and comes from its document encoder."""
        index.check_width(self.question_encoder.dim)
        expected = self.settings.document_encoder_fingerprint
        if expected is not None and expected != index.encoder_fingerprint:
            raise ArtifactError(
                f"The index {index.path} was made by another document encoder ({index.encoder_fingerprint[:12]}…) than "
                f"the model was trained with ({expected[:12]}…). Embed and index the corpus with the model's document "
                "encoder."
            )

    def variant_or(self, variant: Variant | None) -> Variant:
        """Return the requested variant, or else the one the model was trained as; ConfigError if neither is known."""
        chosen = variant or self.settings.variant
        if chosen is None:
            raise ConfigError(
                "This model has not been trained as RAG-Sequence or RAG-Token yet. Choose a variant: sequence or token."
            )
        return chosen


def batches_of(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    """Consecutive slices of at most `size` items."""
    return [items[start : start + size] for start in range(0, len(items), size)]
