"""Maximum inner product search over a frozen corpus: the index artefact.

Owner of its layout: `index.faiss` (may be compressed), `vectors.npy` (every passage's vector at stored precision,
memory-mapped) and `passages.arrow` (memory-mapped text). FAISS proposes rows; the scores that leave this module are
always inner products with the stored vectors, never the index's compressed ones, because gradients flow through them.

Shapes: N passages, B questions, K passages per question, D embedding.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.lib.format import write_array_header_1_0
from pydantic import BaseModel, ConfigDict, Field

from rag_core.artefact import Manifest, local_copy, open_artefact, publish
from rag_core.artefact_inputs import input_paths
from rag_core.corpus import Corpus
from rag_core.embeddings import Embeddings
from rag_core.errors import ArtefactError, ConfigError
from rag_core.index_factory import choose_factory, make_faiss_index, refine_factor, tune_recall
from rag_core.passage_store import PassageStore, write_passage_store
from rag_core.passages import Passage

KIND = "index"


class IndexConfig(BaseModel):
    """What FAISS index is built."""

    model_config = ConfigDict(extra="forbid")

    factory: str = Field(
        "auto", description="'auto', or a FAISS factory string such as 'Flat', 'HNSW32' or 'IVF1024,SQ8'"
    )
    target_recall: float = Field(0.95, gt=0, le=1, description="recall@10 against exact search that 'auto' tunes for")
    seed: int = Field(0, description="chooses the sample on which an approximate index is trained and measured")


@dataclass(frozen=True, slots=True)
class Retrieved:
    """The K passages found for each question, best first.

    rows_BK: int64, rows of the index; vectors_BKD: float32, the stored vectors; scores_BK: float32, inner products
    (not scaled).
    """

    rows_BK: np.ndarray
    vectors_BKD: np.ndarray
    scores_BK: np.ndarray


def index_inputs(embeddings: Embeddings, corpus: Corpus) -> dict[str, str]:
    """Fingerprints of what an index is made from, for the stage's key."""
    return {"embeddings": embeddings.manifest.fingerprint, "corpus": corpus.manifest.fingerprint}


def build_index(
    embeddings: Embeddings, corpus: Corpus, out: Path, config: IndexConfig, queries_QD: np.ndarray | None = None
) -> Manifest:
    """Build and publish an index; with vectors of questions `queries_QD`, its recall is tuned on them.

    Raises:
        ArtefactError: the embeddings were made from another corpus.
        ConfigError: FAISS does not know the factory string, or it does not fit the corpus.
    """
    if embeddings.manifest.made_from.get("corpus") != corpus.manifest.fingerprint:
        raise ArtefactError(
            f"The embeddings in {embeddings.path} were made from another corpus than {corpus.path}. "
            "Embed this corpus, or give the corpus that was embedded."
        )
    with publish(out, KIND, config=config.model_dump(), made_from=index_inputs(embeddings, corpus)) as draft:
        vectors_ND = _write_vectors(embeddings, draft.folder / "vectors.npy")
        stored = write_passage_store((pq.read_table(shard) for shard in corpus.shards), draft.folder / "passages.arrow")
        if stored != len(vectors_ND):
            raise ArtefactError(
                f"{corpus.path} has {stored} passages, {embeddings.path} {len(vectors_ND)}. Embed again."
            )
        factory = choose_factory(len(vectors_ND), embeddings.dim) if config.factory == "auto" else config.factory
        faiss_index = make_faiss_index(vectors_ND, factory, config.seed)
        measured = tune_recall(
            faiss_index, vectors_ND, config.target_recall, config.seed, refine_factor(factory), queries_QD
        )
        faiss.write_index(faiss_index, str(draft.folder / "index.faiss"))
        draft.counts["passages"] = stored
        draft.details = {
            **{name: embeddings.manifest.details[name] for name in ("dim", "dtype", "encoder", "encoder_fingerprint")},
            "factory": factory,
            "recall_at_10": measured.chosen.recall_at_10,
            "search_parameter": measured.chosen.parameter,
            "search_value": measured.chosen.value,
            "recall_curve": [asdict(point) for point in measured.curve],
            "inputs": input_paths(embeddings=embeddings.place, corpus=corpus.place),
        }
    return open_artefact(out, KIND, check_content=False)


class PassageIndex:
    """A published index, opened for searching; any number of processes may share the mapped files."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self.dim: int = manifest.details["dim"]
        self.encoder_fingerprint: str = manifest.details["encoder_fingerprint"]
        self.passages = PassageStore(path / "passages.arrow")
        self._vectors_ND = np.load(path / "vectors.npy", mmap_mode="r", allow_pickle=False)
        self._faiss = faiss.read_index(str(path / "index.faiss"), faiss.IO_FLAG_MMAP)
        self._refine_factor = (
            1 if isinstance(self._faiss, faiss.IndexFlat) else refine_factor(manifest.details["factory"])
        )
        parameter, value = manifest.details["search_parameter"], manifest.details["search_value"]
        if parameter:
            faiss.ParameterSpace().set_index_parameter(self._faiss, parameter, value)

    @classmethod
    def open(cls, path: Path, *, check_content: bool = True) -> PassageIndex:
        """Open an index; raises ArtefactError if it is missing or damaged."""
        path = local_copy(path)
        return cls(path, open_artefact(path, KIND, check_content=check_content))

    def __len__(self) -> int:
        return len(self._vectors_ND)

    def search(self, queries_BD: np.ndarray, k: int) -> Retrieved:
        """The k passages with the largest inner products, best first, re-scored with the stored vectors.

        Args:
            queries_BD: float32 question vectors.
            k: passages per question, 1 … N.

        Raises:
            ConfigError: k is larger than the corpus, or the queries have another width than the index.
        """
        self.check_width(queries_BD.shape[-1])
        self.check_num_docs(k)
        queries_BD = np.ascontiguousarray(queries_BD, dtype=np.float32)
        _, rows_BP = self._faiss.search(queries_BD, min(len(self), k * self._refine_factor))
        scores_BP = self._inner_products(queries_BD, rows_BP)
        best_BK = np.argsort(-scores_BP, axis=1, kind="stable")[:, :k]
        scores_BK = np.take_along_axis(scores_BP, best_BK, axis=1)
        if np.isneginf(scores_BK).any():
            raise ConfigError(
                f"The index {self.path} found fewer than {k} passages for a question: it probes too few lists. "
                "Build it with another factory string (or 'auto'), or ask for fewer passages."
            )
        rows_BK = np.take_along_axis(rows_BP, best_BK, axis=1)
        return Retrieved(rows_BK, self._vectors_ND[rows_BK].astype(np.float32, copy=False), scores_BK)

    def _inner_products(self, queries_BD: np.ndarray, rows_BP: np.ndarray) -> np.ndarray:
        """Inner products (B, P) with stored vectors, −inf where the row is −1 (FAISS found fewer)."""
        scores_BP = np.full(rows_BP.shape, -np.inf, dtype=np.float32)
        if self._vectors_ND.dtype == np.float32:  # FAISS reads them where they lie, with all cores.
            sizes = self.dim, *rows_BP.shape
            pointers = (faiss.swig_ptr(array) for array in (scores_BP, queries_BD, self._vectors_ND, rows_BP))
            faiss.fvec_inner_products_by_idx(*pointers, *sizes)  # type: ignore[attr-defined]
        else:
            for query_D, rows_P, scores_P in zip(queries_BD, rows_BP, scores_BP, strict=True):
                scores_P[:] = self._vectors_ND[np.maximum(rows_P, 0)].astype(np.float32) @ query_D
        scores_BP[rows_BP < 0] = -np.inf
        return scores_BP

    def passages_of(self, rows_BK: np.ndarray) -> list[list[Passage]]:
        """The passages at rows (B, K)."""
        return [self.passages.take(rows_K) for rows_K in rows_BK]

    def check_width(self, width: int) -> None:
        """Raise ConfigError if question vectors of this width cannot be compared with the index's."""
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


def _write_vectors(embeddings: Embeddings, out_file: Path) -> np.ndarray:
    """Copy the vectors of all shards into one row-addressable file and map it."""
    rows, dtype = 0, np.dtype(embeddings.dtype)
    header = {"descr": dtype.str, "fortran_order": False, "shape": (len(embeddings), embeddings.dim)}
    with out_file.open("wb") as file:  # written, not mapped: pages that wait to be written would count as ours
        write_array_header_1_0(file, header)
        for ids, vectors_nD in embeddings.iter_vectors():
            file.write(np.ascontiguousarray(vectors_nD, dtype=dtype).data)
            rows += len(ids)
    pa.default_memory_pool().release_unused()
    if rows != len(embeddings):
        raise ArtefactError(
            f"{embeddings.path} holds {rows} vectors, its manifest says {len(embeddings)}. Embed again."
        )
    return np.load(out_file, mmap_mode="r", allow_pickle=False)
