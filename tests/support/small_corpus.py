"""A corpus of nine facts, questions about it, and tiny models: everything that a stage needs, made in seconds."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import BertConfig, BertModel, BertTokenizer

from rag_core.corpus.corpus import Corpus, CorpusConfig, write_corpus
from rag_core.embeddings.embeddings import EmbedConfig, Embeddings, embed_shard, shard_name
from rag_core.embeddings.text_encoder import EncoderSettings, TextEncoder
from rag_core.index.passage_index import IndexConfig, PassageIndex, build_index
from rag_core.model.settings import ModelConfig
from rag_core.reading.prompt import PromptConfig
from rag_core.storage.artifact import publish
from rag_core.training.loop import OptimizerConfig
from rag_core.training.pretraining import PretrainConfig, build_generator

FACTS = [
    ("lyon:country", "Lyon", "Lyon is a city in France."),
    ("lyon:people", "Lyon", "About 522,000 people live in Lyon."),
    ("lyon:river", "Lyon", "The river of Lyon is the Rhone."),
    ("oslo:country", "Oslo", "Oslo is a city in Norway."),
    ("oslo:people", "Oslo", "About 709,000 people live in Oslo."),
    ("oslo:river", "Oslo", "The river of Oslo is the Akerselva."),
    ("cork:country", "Cork", "Cork is a city in Ireland."),
    ("cork:people", "Cork", "About 224,000 people live in Cork."),
    ("cork:river", "Cork", "The river of Cork is the Lee."),
]
QUESTIONS = [
    ("which country is Lyon in?", "France", "lyon:country", "country"),
    ("how many inhabitants has Lyon?", "522,000", "lyon:people", "people"),
    ("what water flows through Lyon?", "Rhone", "lyon:river", "river"),
    ("which country is Oslo in?", "Norway", "oslo:country", "country"),
    ("how many inhabitants has Oslo?", "709,000", "oslo:people", "people"),
    ("what water flows through Oslo?", "Akerselva", "oslo:river", "river"),
    ("which country is Cork in?", "Ireland", "cork:country", "country"),
    ("how many inhabitants has Cork?", "224,000", "cork:people", "people"),
]
PROMPT = PromptConfig(template="{text} // {question}", max_context_tokens=48, max_answer_tokens=8)


def write_passages_jsonl(file: Path) -> Path:
    """The facts as JSON lines."""
    rows = [{"id": fact_id, "title": title, "text": text} for fact_id, title, text in FACTS]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def write_questions_jsonl(file: Path) -> Path:
    """The questions as JSON lines, with answers, types and gold passages."""
    rows = [
        {"id": str(number), "question": question, "answers": [answer], "gold_passage_ids": [gold], "type": kind}
        for number, (question, answer, gold, kind) in enumerate(QUESTIONS)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def make_encoder(folder: Path, *, hidden_size: int = 32, seed: int = 0) -> Path:
    """A BERT of two layers with random weights and a vocabulary made from the facts and questions."""
    folder.mkdir(parents=True, exist_ok=True)
    words: set[str] = set()
    for text in [*(fact[2] for fact in FACTS), *(row[0] for row in QUESTIONS)]:
        spaced = "".join(letter if letter.isalnum() else f" {letter} " for letter in text.lower())
        words |= set(spaced.split())
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "/", *sorted(words)]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(vocabulary)})
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=hidden_size,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    TextEncoder(BertModel(config), tokenizer, EncoderSettings(max_tokens=48)).save_pretrained(folder)
    return folder


def make_generator(folder: Path, encoder: Path) -> Path:
    """An untrained encoder-decoder, initialised from the encoder's weights."""
    torch.manual_seed(1)
    model, tokenizer = build_generator(PretrainConfig(encoder=str(encoder), encoder_layers=2, decoder_layers=1))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_index(folder: Path, encoder: Path) -> PassageIndex:
    """Make corpus, embeddings and index of the facts below `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    source = write_passages_jsonl(folder / "passages.jsonl")
    write_corpus([source], folder / "corpus", CorpusConfig(format="jsonl", shard_rows=4))
    corpus, loaded = Corpus.open(folder / "corpus"), TextEncoder.from_pretrained(encoder)
    config = EmbedConfig(encoder=str(encoder))
    with publish(folder / "embeddings", "embeddings", made_from={"corpus": corpus.manifest.fingerprint}) as draft:
        for number, shard in enumerate(corpus.shards):
            embed_shard(loaded, shard, draft.folder / shard_name(number), config)
        draft.counts["passages"] = len(corpus)
        draft.details = {
            "dim": loaded.dim,
            "dtype": "float32",
            "encoder": str(encoder),
            "encoder_fingerprint": loaded.fingerprint(),
        }
    build_index(Embeddings.open(folder / "embeddings"), corpus, folder / "index", IndexConfig())
    return PassageIndex.open(folder / "index")


def model_config(encoder: Path, generator: Path, num_docs: int = 3) -> ModelConfig:
    """Configuration of a RAG model over the tiny encoder and generator."""
    return ModelConfig(
        question_encoder=str(encoder), generator=str(generator), score_scale=4.0, num_docs=num_docs, prompt=PROMPT
    )


def optimizer(steps: int, **changes: object) -> OptimizerConfig:
    """Settings of a short training run."""
    return OptimizerConfig.model_validate(
        {"steps": steps, "batch_size": 4, "log_every": 1, "eval_every": steps, **changes}
    )
