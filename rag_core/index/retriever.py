"""The interface of an index for training and inference: search for the exact top K, and read the passages at rows.

`Retriever` is the base class for shards in this process (`rag_core.index.passage_index.PassageIndex`) and for shards in
other processes. Every shard searches for the same questions. The results are merged by score, equal scores by row, so
an answer does not depend on the number of shards or on where they are.

Shapes: N passages, B questions, K passages per question, P proposed rows, D embedding.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rag_core.corpus.passages import Passage
from rag_core.errors import ArtifactError, ConfigError, NotFiniteError
from rag_core.storage.artifact import Manifest


@dataclass(frozen=True, slots=True)
class Retrieved:
    """The K passages found for each question, best first.

    rows_BK: int64, rows of the index; vectors_BKD: float32, the stored vectors; scores_BK: float32, inner products
    (not scaled), −inf where a shard found fewer than K.
    """

    rows_BK: np.ndarray
    vectors_BKD: np.ndarray
    scores_BK: np.ndarray


@dataclass(frozen=True, slots=True)
class ShardRange:
    """A contiguous range of an index's rows, and the folder in the index that holds it ("": the index's own folder)."""

    folder: str
    first_row: int
    rows: int


def shard_ranges(manifest: Manifest) -> list[ShardRange]:
    """The shards of an index, in the order of their rows; an index in one piece counts as one shard."""
    shards = manifest.details.get("shards")
    if shards is None:
        return [ShardRange("", 0, manifest.counts["passages"])]
    return [ShardRange(shard_name(number), shard["first_row"], shard["rows"]) for number, shard in enumerate(shards)]


def shard_name(number: int) -> str:
    """Name of a shard's folder."""
    return f"shard-{number:05d}"


def best_first(rows_BP: np.ndarray, scores_BP: np.ndarray, k: int) -> np.ndarray:
    """Places (B, k) of the largest scores, equal ones by row."""
    return np.lexsort((rows_BP, -scores_BP), axis=-1)[:, :k]


def merge(results: Sequence[Retrieved], k: int) -> Retrieved:
    """The k best passages of several shards' results, whose rows must be those of the whole index."""
    if len(results) == 1:
        return results[0]
    rows_BP = np.concatenate([result.rows_BK for result in results], axis=1)
    scores_BP = np.concatenate([result.scores_BK for result in results], axis=1)
    vectors_BPD = np.concatenate([result.vectors_BKD for result in results], axis=1)
    best_BK = best_first(rows_BP, scores_BP, k)
    return Retrieved(
        np.take_along_axis(rows_BP, best_BK, axis=1),
        np.take_along_axis(vectors_BPD, best_BK[:, :, None], axis=1),
        np.take_along_axis(scores_BP, best_BK, axis=1),
    )


class Retriever(ABC):
    """An index that can be searched. `path` and `manifest` are those of the artifact."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        try:
            self.dim: int = manifest.details["dim"]
            self.encoder_fingerprint: str = manifest.details["encoder_fingerprint"]
            self.ranges = shard_ranges(manifest)
        except (KeyError, TypeError) as error:
            raise ArtifactError(
                f"{path}: the manifest does not describe an index ({error!r}). Build it again."
            ) from error

    @abstractmethod
    def _search_shards(self, queries_BD: np.ndarray, k: int) -> list[Retrieved]:
        """The result of every shard: at most k passages each."""

    @abstractmethod
    def _passages_of_shards(self, rows_n: Mapping[int, np.ndarray]) -> Mapping[int, list[Passage]]:
        """The passages at some rows of the whole index, both keyed by the number of the shard that holds them."""

    def __len__(self) -> int:
        return self.manifest.counts["passages"]

    def search(self, queries_BD: np.ndarray, k: int) -> Retrieved:
        """The k passages with the largest inner products, best first, re-scored with the stored vectors.

        With equal scores the passage with the lower row comes first. The answer of a `Flat` index is exact, even
        among equal scores.

        Args:
            queries_BD: float32 question vectors.
            k: passages per question, 1 … N.

        Raises:
            ConfigError: k is larger than the corpus, or the queries have another width than the index.
            NotFiniteError: a query holds NaN or infinity, so nothing can be found for it.
        """
        self.check_width(queries_BD.shape[-1])
        self.check_num_docs(k)
        _check_finite(queries_BD)
        retrieved = merge(self._search_shards(np.ascontiguousarray(queries_BD, dtype=np.float32), k), k)
        if retrieved.scores_BK.shape[1] < k or np.isneginf(retrieved.scores_BK).any():
            raise ConfigError(
                f"The index {self.path} found fewer than {k} passages for a question: it probes too few lists. "
                "Build it with another factory string (or 'auto'), or ask for fewer passages."
            )
        return retrieved

    def passages_of(self, rows_BK: np.ndarray) -> list[list[Passage]]:
        """The passages at rows (B, K)."""
        rows_n = np.unique(rows_BK)
        shards_n = np.searchsorted([shard.first_row for shard in self.ranges], rows_n, side="right") - 1
        rows_of_shards = {int(shard): rows_n[shards_n == shard] for shard in np.unique(shards_n)}
        passages_of_shards = self._passages_of_shards(rows_of_shards)
        passages = {
            int(row): passage
            for shard, rows in rows_of_shards.items()
            for row, passage in zip(rows, passages_of_shards[shard], strict=True)
        }
        return [[passages[row] for row in rows_K] for rows_K in rows_BK.tolist()]

    def check_width(self, width: int) -> None:
        """Raise ConfigError unless question vectors of this width can be compared with the index's."""
        if width != self.dim:
            raise ConfigError(
                f"The question encoder gives {width} dimensions, the index {self.path} holds {self.dim}. "
                "Use the encoder that the index was made with, or embed and index the corpus with this one."
            )

    def check_num_docs(self, k: int) -> None:
        """Raise ConfigError unless 1 ≤ k ≤ N."""
        if not 1 <= k <= len(self):
            raise ConfigError(
                f"{k} passages per question were asked for, but the index {self.path} holds {len(self)}. "
                f"Ask for 1 to {len(self)}."
            )


def _check_finite(queries_BD: np.ndarray) -> None:
    bad = len(queries_BD) - int(np.isfinite(queries_BD).all(axis=-1).sum())
    if bad:
        problem = (
            f"{bad} of {len(queries_BD)} questions have a vector with NaN or infinity in it, so nothing can be found."
        )
        raise NotFiniteError.of("the question encoder's vectors", problem)
