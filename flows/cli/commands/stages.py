"""Commands that run one stage: corpus, embed, index, pretrain, train, infer, evaluate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from flows.cli.options import AnswersAreOption, Match, TrustRemoteCode
from flows.cli.prefect_server import with_services
from flows.cli.printing import print_scores, print_stage

Out = Annotated[Path, typer.Option("--out", help="Folder to write. It appears complete or not at all.")]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="YAML file of a run; the command reads only its own sections.")
]
Questions = Annotated[
    Path,
    typer.Option(
        "--questions", help="JSON Lines, JSON, CSV or Parquet in a layout of docs/formats.md; BEIR's qrels file."
    ),
]
Retrieval = Annotated[
    str | None,
    typer.Option(help="local: every worker maps the whole index; sharded: Ray actors hold a shard each. Same results."),
]
Replicas = Annotated[int | None, typer.Option(help="With sharded retrieval: actors for each shard.")]


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    on_ray, training = (embed, pretrain, train, infer), (pretrain, train)
    for command in (corpus, embed, index, pretrain, train, infer, evaluate):
        services = with_services(command, ray=command in on_ray, trains=command in training)
        app.command(rich_help_panel="Stages")(services)


def corpus(
    sources: Annotated[list[Path], typer.Argument(help="Files or folders.", metavar="SOURCE…")],
    out: Out,
    format: Annotated[
        str,
        typer.Option(
            help="auto: recognise each file by its content. jsonl | json | dpr-tsv | csv | parquet | squad | text: "
            "read only files of that format."
        ),
    ] = "auto",
    words_per_passage: Annotated[int, typer.Option(help="Plain text: passages of at most this many words.")] = 100,
    shard_rows: Annotated[int, typer.Option(help="Passages in a Parquet shard.")] = 50_000,
    max_rejects_share: Annotated[
        float, typer.Option(help="Share of rows that may be rejected, 0 to 1; more rejects fail the run.")
    ] = 0.01,
) -> None:
    """Read passages and write canonical Parquet shards; rejected rows go to rejects.jsonl with file and line.

    Reads BEIR, DPR, pyserini, FlashRAG, KILT, SQuAD, HotpotQA and plain files
    with id, title and text, from JSON Lines, JSON, Parquet, CSV or TSV; and text
    (.txt, .md). docs/formats.md has the keys.
    """
    from flows.cli.settings import parse
    from flows.stages.make_corpus import make_corpus
    from rag_core.corpus.corpus import CorpusConfig

    settings = {
        "format": format,
        "words_per_passage": words_per_passage,
        "shard_rows": shard_rows,
        "max_rejects_share": max_rejects_share,
    }
    print_stage(make_corpus(sources, out, parse(CorpusConfig, settings, "corpus options")))


def embed(
    corpus: Annotated[Path, typer.Option("--corpus", help="Folder written by `rag corpus`.")],
    encoder: Annotated[str, typer.Option(help="Document encoder: folder, hub name, or package:NAME/FOLDER.")],
    out: Out,
    prompt: Annotated[
        str | None, typer.Option(help="Text put before every passage, such as 'passage: '; default: the encoder's own.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32 | float16: how vectors are stored.")] = "float32",
    precision: Annotated[str, typer.Option(help="auto | float32 | bfloat16: the encoder's arithmetic.")] = "auto",
    batch_tokens: Annotated[
        int | None, typer.Option(help="Tokens per batch, padding included; default: depends on the device.")
    ] = None,
    num_workers: Annotated[int, typer.Option(help="Actors; 0: one for each GPU, else one for each machine.")] = 0,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Embed a corpus with a frozen document encoder on Ray."""
    from flows.cli.settings import parse
    from flows.stages.embed_corpus import embed_corpus
    from rag_core.embeddings.embeddings import EmbedConfig

    settings = {
        "encoder": encoder,
        "prompt": prompt,
        "dtype": dtype,
        "precision": precision,
        "batch_tokens": batch_tokens,
        "num_workers": num_workers,
        "trust_remote_code": trust_remote_code,
    }
    print_stage(embed_corpus(corpus, out, parse(EmbedConfig, settings, "embed options")))


def index(
    embeddings: Annotated[Path, typer.Option(help="Folder written by `rag embed`.")],
    corpus: Annotated[Path, typer.Option("--corpus", help="The corpus that was embedded.")],
    out: Out,
    factory: Annotated[
        str, typer.Option(help="auto, or a FAISS factory string such as Flat, HNSW32, IVF1024,SQ8.")
    ] = "auto",
    target_recall: Annotated[float, typer.Option(help="recall@10 that an approximate index is tuned for.")] = 0.95,
    shards: Annotated[int, typer.Option(help="Number of FAISS indexes that the passages are divided among.")] = 1,
) -> None:
    """Build a FAISS index and measure its recall@10 against exact search."""
    from flows.cli.settings import parse
    from flows.stages.build_index import build_index
    from rag_core.index.passage_index import IndexConfig

    settings = {"factory": factory, "target_recall": target_recall, "shards": shards}
    print_stage(build_index(embeddings, corpus, out, parse(IndexConfig, settings, "index options")))


def pretrain(
    corpus: Annotated[Path, typer.Option("--corpus", help="Folder written by `rag corpus`.")],
    questions: Questions,
    dev: Annotated[Path, typer.Option(help="Dev questions.")],
    out: Out,
    config: ConfigFile = None,
    encoder: Annotated[str | None, typer.Option(help="Encoder that both sides start from; overrides the file.")] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Make a generator from an encoder, if no pretrained seq2seq model is available (section `pretrain` of --config).

    Questions must name their gold passage (gold_passage_ids).
    """
    from flows.cli.settings import parse, read_section
    from flows.stages.pretrain_generator import pretrain_generator
    from rag_core.training.pretraining import PretrainConfig

    content = read_section(config, "pretrain") if config else {}
    content |= {"encoder": encoder} if encoder else {}
    content |= {"trust_remote_code": True} if trust_remote_code else {}
    settings = parse(PretrainConfig, content, f"{config or 'options'}, section `pretrain`")
    print_stage(pretrain_generator(corpus, questions, dev, out, settings))


def train(
    variant: Annotated[str, typer.Option(help="sequence | token")],
    index: Annotated[Path, typer.Option("--index", help="Folder written by `rag index`.")],
    questions: Questions,
    dev: Annotated[Path, typer.Option(help="Dev questions, by which the best weights are chosen.")],
    config: Annotated[Path, typer.Option(help="YAML file of a run; its sections `model` and `train` are read.")],
    out: Out,
    generator: Annotated[str | None, typer.Option(help="Overrides model.generator.")] = None,
    question_encoder: Annotated[str | None, typer.Option(help="Overrides model.question_encoder.")] = None,
    question_prompt: Annotated[str | None, typer.Option(help="Overrides model.question_prompt.")] = None,
    steps: Annotated[int | None, typer.Option(help="Overrides train.optimizer.steps.")] = None,
    num_workers: Annotated[int | None, typer.Option(help="Overrides train.num_workers.")] = None,
    retrieval: Retrieval = None,
    replicas: Replicas = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Train question encoder and generator end to end, with retrieval inside every step."""
    from flows.cli.settings import parse, read_section
    from flows.stages.train import train_sequence, train_token
    from rag_core.errors import ConfigError
    from rag_core.model.settings import ModelConfig
    from tasks.stages.train import TrainConfig

    flows = {"sequence": train_sequence, "token": train_token}
    if variant not in flows:
        raise ConfigError(f"Unknown variant {variant!r}. Give --variant sequence or --variant token.")
    content = read_section(config, "model")
    content |= {"generator": generator} if generator else {}
    content |= {"question_encoder": question_encoder} if question_encoder else {}
    content |= {"question_prompt": question_prompt} if question_prompt is not None else {}
    content |= {"trust_remote_code": True} if trust_remote_code else {}
    model = parse(ModelConfig, content, f"{config}, section `model`")
    training = read_section(config, "train")
    training |= {"num_workers": num_workers} if num_workers is not None else {}
    training["retrieval"] = {**read_section(config, "train", "retrieval"), **_retrieval(retrieval, replicas)}
    if steps is not None:
        training["optimizer"] = {**read_section(config, "train", "optimizer"), "steps": steps}
    settings = parse(TrainConfig, training, f"{config}, section `train`")
    print_stage(flows[variant](index, questions, dev, out, model, settings))


def infer(
    model: Annotated[Path, typer.Option(help="Folder written by `rag train`.")],
    index: Annotated[Path, typer.Option("--index", help="Folder written by `rag index`.")],
    questions: Questions,
    out: Out,
    variant: Annotated[str | None, typer.Option(help="sequence | token; empty: as trained.")] = None,
    num_docs: Annotated[int | None, typer.Option(help="Passages per question; empty: the model's own.")] = None,
    num_beams: Annotated[int, typer.Option(help="Beams per passage (sequence) or per question (token).")] = 4,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer in tokens.")] = 32,
    mode: Annotated[str, typer.Option(help="RAG-Sequence: thorough | fast.")] = "thorough",
    num_return_sequences: Annotated[int, typer.Option(help="Candidates kept for each question.")] = 3,
    batch_size: Annotated[int, typer.Option(help="Questions decoded at once.")] = 16,
    precision: Annotated[str, typer.Option(help="auto | float32 | bfloat16: the generator's arithmetic.")] = "auto",
    num_workers: Annotated[int, typer.Option(help="Actors; 0: one for each GPU, else one for each machine.")] = 0,
    retrieval: Retrieval = None,
    replicas: Replicas = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Answer a question file on Ray; write predictions.jsonl and predictions.parquet in the order of the file."""
    from flows.cli.settings import parse
    from flows.stages.batch_infer import batch_infer
    from tasks.on_ray.answering import InferConfig

    decoding = {
        "num_beams": num_beams,
        "max_new_tokens": max_new_tokens,
        "mode": mode,
        "num_return_sequences": num_return_sequences,
        "batch_size": batch_size,
        "precision": precision,
    }
    settings = {
        "variant": variant,
        "num_docs": num_docs,
        "decoding": decoding,
        "num_workers": num_workers,
        "retrieval": _retrieval(retrieval, replicas),
        "trust_remote_code": trust_remote_code,
    }
    print_stage(batch_infer(model, index, questions, out, parse(InferConfig, settings, "infer options")))


def evaluate(
    predictions: Annotated[Path, typer.Option(help="Folder written by `rag infer`.")],
    questions: Questions,
    k: Annotated[str, typer.Option("--k", help="k of recall@k, separated by commas.")] = "1,5",
    match: Match = "words",
    answers_are: AnswersAreOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Compute EM, F1 and recall@k, overall and by question type."""
    from flows.cli.printing import parse_ks, parse_match
    from flows.stages.evaluate import evaluate as evaluate_flow
    from rag_core.questions.questions import as_answers_are

    match_rule, answer_kind = parse_match(match), as_answers_are(answers_are)
    result, scores = evaluate_flow(predictions, questions, parse_ks(k), match=match_rule, answers_are=answer_kind)
    if as_json:
        typer.echo(json.dumps(scores.as_json(), ensure_ascii=False))
    else:
        print_scores(scores)
        print_stage(result)


def _retrieval(mode: str | None, replicas: int | None) -> dict[str, object]:
    """The settings of the section `retrieval` that were given as options."""
    return {name: value for name, value in (("mode", mode), ("replicas", replicas)) if value is not None}
