"""What can be found wrong with a run before its first stage, in seconds instead of hours: each check reads a little.

A check raises the error that the stage would raise later. `Problems` collects them, so that one run tells all that is
wrong, not one thing after another.
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

# Rows read of each source file, and files of which rows are read.
FIRST_ROWS = 200
FIRST_FILES = 10


# Why pretraining needs gold passages of dev questions.
NO_CHOICE = "no weights can be chosen"


class Problems:
    """Errors that the user can mend, collected."""

    def __init__(self) -> None:
        self._found: dict[str, RagError] = {}
        self._parts: dict[str, list[str]] = {}

    @contextlib.contextmanager
    def of(self, part: str) -> Iterator[None]:
        """Around a check: a `RagError` is noted under the name of this part of the configuration, and the run goes on."""
        try:
            yield
        except RagError as error:
            self._found.setdefault(str(error), error)
            parts = self._parts.setdefault(str(error), [])
            parts += [part] if part not in parts else []

    def raise_any(self, when: str) -> None:
        """Raise the one error that was found as it is, or one ConfigError that lists several.

        Args:
            when: ends the sentence "3 problems were found …".
        """
        if len(self._found) == 1:
            raise next(iter(self._found.values()))
        if self._found:
            lines = [f"{at}. {', '.join(self._parts[text])}: {text}" for at, text in enumerate(self._found, 1)]
            raise ConfigError("\n".join((f"{len(lines)} problems were found {when}.", *lines)))


def check_sources(sources: Sequence[Path], config: CorpusConfig) -> None:
    """Raise InputError if a source is missing, or the first rows of a file are none of the format."""
    files = expand_sources([local_file(source) for source in sources], config.format)
    for file in files[:FIRST_FILES]:
        rows = read_rows([file.path], config.format, words_per_passage=config.words_per_passage)
        first = list(islice(rows, FIRST_ROWS))
        rejects = [row for row in first if isinstance(row, Reject)]
        if first and len(rejects) == len(first) and config.max_rejects_share < 1:
            one = rejects[0]
            place = "" if one.line is None else f", line {one.line}"
            raise InputError(
                f"{file.path}: none of the first {len(first)} rows is a passage of format {config.format!r}. The first of "
                f"them{place}: {one.reason} (found {one.found!r}). Correct the file, or give the format that it has."
            )


def check_same_width(document_encoder: TextEncoder, question_encoder: TextEncoder) -> None:
    """Raise ConfigError if questions cannot be compared with passages: another width, or DPR's encoders exchanged."""
    if document_encoder.dim != question_encoder.dim:
        raise ConfigError(
            f"The document encoder gives vectors of {document_encoder.dim} dimensions, the question encoder of "
            f"{question_encoder.dim}, so questions and passages cannot be compared. Give encoders that were trained together."
        )
    kinds = tuple(type(one.model).__name__ for one in (document_encoder, question_encoder))
    if kinds == ("DPRQuestionEncoder", "DPRContextEncoder"):
        raise ConfigError(
            "embed.encoder is a DPRQuestionEncoder and model.question_encoder a DPRContextEncoder: they are exchanged. "
            "Passages are embedded by the context encoder."
        )


def check_factory(config: IndexConfig, dim: int) -> None:
    """Raise ConfigError if FAISS does not know the factory string, or it does not fit vectors of this width."""
    if config.factory != "auto":
        empty_index(config.factory, dim)


def check_index_size(config: IndexConfig, dim: int, passages: int) -> None:
    """Raise ConfigError if there are too few passages for the shards or lists that were asked for."""
    if config.shards > passages:
        raise ConfigError(
            f"index.shards is {config.shards}, but there are {passages} passages. Ask for 1 to {passages}."
        )
    lists = 0 if config.factory == "auto" else lists_of(empty_index(config.factory, dim))
    smallest = passages // config.shards
    if lists > smallest:
        raise ConfigError(
            f"index.factory {config.factory!r} has {lists} lists, but a shard has {smallest} passages, too few to train "
            "them on. Use 'auto', or fewer lists."
        )


def check_num_docs(name: str, num_docs: int | None, passages: int) -> None:
    """Raise ConfigError if more passages per question are asked for than there are."""
    if num_docs is not None and num_docs > passages:
        raise ConfigError(f"{name} is {num_docs}, but there are {passages} passages. Ask for 1 to {passages}.")


def check_reading_steps(config: PretrainConfig) -> None:
    """Raise ConfigError if copying leaves no steps in which reading is learnt."""
    if config.copy_steps >= config.optimizer.steps:
        raise ConfigError(
            f"pretrain.copy_steps is {config.copy_steps} of {config.optimizer.steps} steps, so none is left to learn reading. "
            "Lower copy_steps, or raise pretrain.optimizer.steps."
        )


def check_gold(
    questions: Sequence[Question],
    path: Path,
    corpus: Corpus | None = None,
    *,
    purpose: str = "reading cannot be taught",
) -> None:
    """Raise InputError if no question names a gold passage (of the corpus, if there is one): then `purpose`."""
    named = {gold for question in questions if question.answers for gold in question.gold_passage_ids}
    remedy = (
        "Give questions made from this corpus, or leave out the section `pretrain` and name a pretrained generator."
    )
    if not named:
        raise InputError(
            f"{path}: no question names both a gold passage (gold_passage_ids) and an answer, so {purpose}. {remedy}"
        )
    if corpus and not any(passage.id in named for passage in corpus.iter_passages()):
        raise InputError(
            f"{path}: none of its gold passages ({min(named)!r}, …) is in the corpus {corpus.path}, so {purpose}. {remedy}"
        )


def check_place(out: Path) -> None:
    """Raise ArtifactError if an artifact cannot be published at `out`: foreign files, or no permission to write.

    Of a place in an object store the cache beside which its files are made is checked.
    """
    if not isinstance(as_place(out), ObjectPath):
        refuse_foreign_folder(as_place(out))
    place = working_place(out)
    above = next(folder for folder in place.absolute().parents if folder.exists())
    if not above.is_dir():
        raise ArtifactError(f"{above} is a file, so {out} cannot be made below it. Give another --out.")
    try:
        with tempfile.TemporaryDirectory(dir=above, prefix=".rag-preflight-"):
            pass
    except OSError as error:
        raise ArtifactError(
            f"{out} cannot be written: {error.strerror} ({above}). Give an --out where you may write, or make this place "
            "writable."
        ) from error
