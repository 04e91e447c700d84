"""Quick checks of a run before its first stage, so that it fails in seconds and not after hours.

A check raises the same error that the stage would raise later. `Problems` collects the errors, so that one run reports
all of them.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from rag_core.corpus.corpus import Corpus, CorpusConfig
from rag_core.corpus.formats import read_rows
from rag_core.corpus.formats.rows import Reject
from rag_core.corpus.formats.sources import expand_sources
from rag_core.embeddings.text_encoder import TextEncoder
from rag_core.errors import ArtifactError, ConfigError, InputError, RagError
from rag_core.index.factory import empty_index, lists_of
from rag_core.index.passage_index import IndexConfig
from rag_core.questions.questions import Question
from rag_core.storage.artifact import local_file, refuse_foreign_folder, working_place
from rag_core.storage.places import ObjectPath, as_place
from rag_core.training.pretraining import PretrainConfig

# Only the first rows of the first source files are read.
FIRST_ROWS = 200
FIRST_FILES = 10

# What fails if no dev question has a gold passage (for `check_gold`).
NO_CHOICE = "no weights can be chosen"


class Problems:
    """Collects the `RagError`s of several checks, by message."""

    def __init__(self) -> None:
        self._errors: dict[str, RagError] = {}
        self._parts: dict[str, list[str]] = {}

    @contextlib.contextmanager
    def of(self, part: str) -> Iterator[None]:
        """Collect a `RagError` raised inside the block, under this part of the configuration, and go on."""
        try:
            yield
        except RagError as error:
            self._errors.setdefault(str(error), error)
            parts = self._parts.setdefault(str(error), [])
            parts += [part] if part not in parts else []

    def raise_any(self, when: str) -> None:
        """Raise a single collected error unchanged, or one ConfigError that lists several.

        Args:
            when: ends the sentence "3 problems were found …".
        """
        if len(self._errors) == 1:
            raise next(iter(self._errors.values()))
        if self._errors:
            lines = [f"{number}. {', '.join(self._parts[text])}: {text}" for number, text in enumerate(self._errors, 1)]
            raise ConfigError("\n".join((f"{len(lines)} problems were found {when}.", *lines)))


def check_sources(sources: Sequence[Path], config: CorpusConfig) -> None:
    """Raise InputError if a source is missing, or none of a file's first rows is a passage of the format."""
    files = expand_sources([local_file(source) for source in sources], config.format)
    for file in files[:FIRST_FILES]:
        rows = read_rows([file.path], config.format, words_per_passage=config.words_per_passage)
        first_rows = list(islice(rows, FIRST_ROWS))
        rejects = [row for row in first_rows if isinstance(row, Reject)]
        if first_rows and len(rejects) == len(first_rows) and config.max_rejects_share < 1:
            reject = rejects[0]
            place = "" if reject.line is None else f", line {reject.line}"
            raise InputError(
                f"{file.path}: none of the first {len(first_rows)} rows is a passage of format {config.format!r}. The "
                f"first{place}: {reject.reason} (found {reject.found!r}). Correct the file, or give its right format."
            )


def check_same_width(document_encoder: TextEncoder, question_encoder: TextEncoder) -> None:
    """Raise ConfigError if questions cannot be compared with passages: different widths, or DPR's encoders swapped."""
    if document_encoder.dim != question_encoder.dim:
        raise ConfigError(
            f"The document encoder gives vectors of {document_encoder.dim} dimensions, the question encoder of "
            f"{question_encoder.dim}, so questions and passages cannot be compared. "
            "Give encoders that were trained together."
        )
    classes = tuple(type(encoder.model).__name__ for encoder in (document_encoder, question_encoder))
    if classes == ("DPRQuestionEncoder", "DPRContextEncoder"):
        raise ConfigError(
            "embed.encoder is a DPRQuestionEncoder and model.question_encoder is a DPRContextEncoder: "
            "they are swapped. Exchange the two: the context encoder embeds passages."
        )


def check_factory(config: IndexConfig, dim: int) -> None:
    """Raise ConfigError if FAISS does not know the factory string, or cannot use it for vectors of this width."""
    if config.factory != "auto":
        empty_index(config.factory, dim)


def check_index_size(config: IndexConfig, dim: int, passages: int) -> None:
    """Raise ConfigError if there are fewer passages than shards, or fewer passages in a shard than lists."""
    if config.shards > passages:
        raise ConfigError(
            f"index.shards is {config.shards}, but there are {passages} passages. Ask for 1 to {passages}."
        )
    num_lists = 0 if config.factory == "auto" else lists_of(empty_index(config.factory, dim))
    smallest_shard = passages // config.shards
    if num_lists > smallest_shard:
        raise ConfigError(
            f"index.factory {config.factory!r} has {num_lists} lists, but a shard has {smallest_shard} passages, "
            "too few to train them on. Use 'auto', or fewer lists."
        )


def check_num_docs(name: str, num_docs: int | None, passages: int) -> None:
    """Raise ConfigError if `num_docs`, the passages per question, exceeds the passages of the corpus."""
    if num_docs is not None and num_docs > passages:
        raise ConfigError(f"{name} is {num_docs}, but there are {passages} passages. Ask for 1 to {passages}.")


def check_reading_steps(config: PretrainConfig) -> None:
    """Raise ConfigError if `copy_steps` leaves no steps to learn reading."""
    if config.copy_steps >= config.optimizer.steps:
        raise ConfigError(
            f"pretrain.copy_steps is {config.copy_steps} of {config.optimizer.steps} steps, so none is left to learn "
            "reading. Lower copy_steps, or raise pretrain.optimizer.steps."
        )


def check_gold(
    questions: Sequence[Question],
    path: Path,
    corpus: Corpus | None = None,
    *,
    purpose: str = "reading cannot be taught",
) -> None:
    """Raise InputError if no answered question names a gold passage (one in `corpus`, if given).

    `purpose` ends the message's "so …".
    """
    named = {gold for question in questions if question.answers for gold in question.gold_passage_ids}
    remedy = "Give questions made from this corpus, or remove the section `pretrain` and name a pretrained generator."
    if not named:
        raise InputError(
            f"{path}: no question names both a gold passage (gold_passage_ids) and an answer, so {purpose}. {remedy}"
        )
    if corpus and not any(passage.id in named for passage in corpus.iter_passages()):
        raise InputError(
            f"{path}: none of its gold passages ({min(named)!r}, …) is in the corpus {corpus.path}, so {purpose}. "
            f"{remedy}"
        )


def check_place(out: Path) -> None:
    """Raise ArtifactError if an artifact cannot be published at `out`: foreign files, or no permission to write.

    For a place in an object store, this checks the local cache in which the artifact is made.
    """
    if not isinstance(as_place(out), ObjectPath):
        refuse_foreign_folder(as_place(out))
    place = working_place(out)
    parent = next(folder for folder in place.absolute().parents if folder.exists())
    if not parent.is_dir():
        raise ArtifactError(f"{parent} is a file, so {out} cannot be made below it. Give another --out.")
    try:
        with tempfile.TemporaryDirectory(dir=parent, prefix=".rag-preflight-"):
            pass
    except OSError as error:
        raise ArtifactError(
            f"{out} cannot be written: {error.strerror} ({parent}). Give an --out where you may write, or make this "
            "folder writable."
        ) from error
