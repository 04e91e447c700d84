"""Cost of retrieval and context assembly inside a training step.

The step is that of `rag train`: MiniLM as question encoder, a BART-like generator, an index of passages of about 100
tokens, eight questions with five passages each. The share counts index search, reading the passages, joining and
tokenising them. It leaves out the question encoder's pass, which the gradient needs anyway.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.harness import Line, Size, Spread, main
from benchmarks.parts.models import bart
from benchmarks.parts.places import MINILM, embed_in_process, geonames_passages
from rag_core.corpus.corpus import Corpus, write_passages
from rag_core.corpus.passages import Passage
from rag_core.embeddings.text_encoder import TextEncoder
from rag_core.index.passage_index import IndexConfig, PassageIndex, build_index
from rag_core.model.rag_model import RagModel
from rag_core.model.settings import ModelSettings
from rag_core.pretrained.model_source import load_tokenizer, resolve_model_source
from rag_core.questions.questions import Question
from rag_core.reading.prompt import PromptConfig
from rag_core.training.loop import Hooks, OptimizerConfig, Place, run_training
from rag_core.training.objectives import EndToEnd, EndToEndRates

SENTENCES = 5  # of about 20 tokens each


def measure(size: Size) -> list[Line]:
    """One line: retrieval's share of the seconds, with one value per step."""
    passages, batch, steps = (3_000, 8, 6) if size == "full" else (200, 2, 2)
    with tempfile.TemporaryDirectory() as folder:
        index = _index(Path(folder), passages)
        objective = EndToEnd(_model(size), index, "token", EndToEndRates())
        questions = [
            Question(
                id=str(number), question=f"In which country is {passage.text.split(' is a ')[0]}?", answers=("Peru",)
            )
            for number, passage in enumerate(geonames_passages(batch * 4))
        ]
        shares, seconds = _shares(objective, index, questions, batch, steps)
    return [
        Line(
            path="retrieval and context assembly in a training step",
            peer="",
            value=Spread.of(shares),
            unit="% of the step",
            target=3.0,
            higher_is_better=False,
            details={"step_seconds": seconds, "passages": passages, "batch_size": batch},
        )
    ]


def _index(folder: Path, passages: int) -> PassageIndex:
    sentences = geonames_passages(passages * SENTENCES)
    joined = [
        Passage(
            id=str(n),
            title="",
            text=" ".join(sentence.text for sentence in sentences[n * SENTENCES : (n + 1) * SENTENCES]),
        )
        for n in range(passages)
    ]
    write_passages(joined, folder / "corpus", made_from={}, config={}, shard_rows=25_000)
    corpus = Corpus.open(folder / "corpus")
    build_index(embed_in_process(corpus, folder / "embeddings"), corpus, folder / "index", IndexConfig())
    return PassageIndex.open(folder / "index")


def _model(size: Size) -> RagModel:
    tokenizer = load_tokenizer(resolve_model_source(MINILM))
    # At least the vocabulary of the other benchmarks, so that the head is as large as theirs.
    generator = bart(size, vocab_size=max(50_265, len(tokenizer)))
    prompt = PromptConfig(max_context_tokens=128, max_answer_tokens=12)
    settings = ModelSettings(score_scale=20.0, num_docs=5, prompt=prompt)
    return RagModel(TextEncoder.from_pretrained(MINILM), generator, tokenizer, settings)


def _shares(
    objective: EndToEnd, index: PassageIndex, questions: list[Question], batch: int, steps: int
) -> tuple[list[float], list[float]]:
    """Retrieval's percentage, and the seconds, of every step but the first."""
    spent: list[float] = []
    points: list[tuple[float, float]] = []

    def log(step: int, metrics: dict[str, float]) -> None:
        points.append((time.perf_counter(), sum(spent)))

    config = OptimizerConfig(steps=steps, batch_size=batch, log_every=1, eval_every=steps + 1, precision="auto")
    with ExitStack() as stack:
        for owner, name in ((index, "search"), (index, "passages_of"), (objective.model.reader, "_contexts")):
            stack.enter_context(_timed(owner, name, spent))
        run_training(objective, questions, config, Place(), Hooks(log=log))
    pairs = list(pairwise(points))
    seconds = [after[0] - before[0] for before, after in pairs]
    return [100 * (after[1] - before[1]) / (after[0] - before[0]) for before, after in pairs], seconds


@contextmanager
def _timed(owner: Any, name: str, spent: list[float]) -> Iterator[None]:
    original: Callable[..., Any] = getattr(owner, name)

    def timed(*arguments: Any, **options: Any) -> Any:
        start = time.perf_counter()
        try:
            return original(*arguments, **options)
        finally:
            spent.append(time.perf_counter() - start)

    setattr(owner, name, timed)
    try:
        yield
    finally:
        delattr(owner, name)


if __name__ == "__main__":
    main(measure)
