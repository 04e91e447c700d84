"""Commands that run without Prefect, Ray or MLflow: ask, retrieve, doctor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from flows.cli.options import AnswersAreOption, Match, TrustRemoteCode
from flows.cli.printing import parse_ks, parse_match, parse_variant, print_answer, print_scores

Index = Annotated[Path, typer.Option("--index", help="Folder written by `rag index`.")]


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    for command in (ask, retrieve, doctor):
        app.command(rich_help_panel="Ask and inspect")(command)


def ask(
    question: Annotated[str, typer.Argument(help="A question in plain words.")],
    model: Annotated[Path, typer.Option(help="Folder written by `rag train`.")] = Path("runs/demo/rag-token"),
    index: Index = Path("runs/demo/index"),
    variant: Annotated[str | None, typer.Option(help="sequence | token; empty: as trained.")] = None,
    num_docs: Annotated[int | None, typer.Option(help="Passages to read; empty: the model's own.")] = None,
    num_beams: Annotated[int, typer.Option(help="Beams.")] = 4,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Answer one question with a trained model, and show the passages that it read."""
    from flows.cli.settings import parse
    from rag_core.errors import ConfigError
    from rag_core.evaluation.predictions import prediction_row
    from rag_core.index.passage_index import PassageIndex
    from rag_core.model.rag_model import RagModel
    from rag_core.model.reader import DecodingConfig
    from rag_core.questions.questions import Question

    if not question.strip():
        raise ConfigError('The question is empty. Give one in quotes: rag ask "Which country is Lyon in?"')
    parsed_variant = parse_variant(variant)
    decoding = parse(DecodingConfig, {"num_beams": num_beams}, "ask options")
    loaded, opened = RagModel.from_pretrained(model, trust_remote_code=trust_remote_code), PassageIndex.open(index)
    answer = loaded.answer([question], opened, variant=parsed_variant, num_docs=num_docs, decoding=decoding)[0]
    if as_json:
        typer.echo(json.dumps(prediction_row(Question(id="1", question=question), answer), ensure_ascii=False))
    else:
        print_answer(answer)


def retrieve(
    index: Index,
    questions: Annotated[Path, typer.Option(help="A question file with answers or gold passages.")],
    k: Annotated[str, typer.Option("--k", help="k of recall@k, separated by commas.")] = "1,5,20",
    model: Annotated[Path | None, typer.Option(help="Use the question encoder of this trained model.")] = None,
    encoder: Annotated[str | None, typer.Option(help="Use this question encoder; default: the index's own.")] = None,
    question_prompt: Annotated[
        str | None, typer.Option(help="Text put before every question, such as 'query: '; default: the encoder's own.")
    ] = None,
    match: Match = "words",
    answers_are: AnswersAreOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object with recall@k as fractions.")] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Measure an index's recall@k without a generator: by gold passages, where known, and by answer strings."""
    from rag_core.embeddings.text_encoder import TextEncoder
    from rag_core.evaluation.evaluation import check_own_encoder, evaluate_retrieval, gold_hint, spaceless_hint
    from rag_core.index.passage_index import PassageIndex
    from rag_core.model.rag_model import RagModel
    from rag_core.questions.questions import as_answers_are, read_question_file
    from rag_core.verification.question_checks import check_retrieval
    from tasks.terminal import say

    ks, rule = parse_ks(k), parse_match(match)
    opened = PassageIndex.open(index)
    file = read_question_file(questions, as_answers_are(answers_are))
    check_retrieval(file)
    if model:
        loaded = RagModel.from_pretrained(model, trust_remote_code=trust_remote_code)
        loaded.check_index(opened)
        question_encoder = loaded.question_encoder.for_questions(question_prompt)
    else:
        details = opened.manifest.details
        document_prompt = details.get("prompt") if encoder is None else None
        loaded_encoder = TextEncoder.from_pretrained(
            encoder or details["encoder"], side="passage", prompt=document_prompt, trust_remote_code=trust_remote_code
        )
        if encoder is None:
            check_own_encoder(opened, loaded_encoder)
        question_encoder = loaded_encoder.for_questions(question_prompt)
    for hint in filter(None, (spaceless_hint(file.questions, rule), gold_hint(file.questions, opened))):
        say(hint, style="yellow")
    scores = evaluate_retrieval(opened, question_encoder, file.questions, ks, match=rule)
    if as_json:
        typer.echo(json.dumps(scores.as_json(), ensure_ascii=False))
    else:
        print_scores(scores)


def doctor(
    model: Annotated[
        Path | None, typer.Option(help="Show what this trained model reads and writes instead: one whole context.")
    ] = None,
    index: Annotated[Path | None, typer.Option(help="With --model: read the best passage of this index.")] = None,
    questions: Annotated[
        Path | None, typer.Option(help="With --model: ask the first question of this file that has an answer.")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Show versions, cores, GPUs and the servers in use, and what is missing or wrong (then exit code 1)."""
    from flows.cli.commands.doctor import examine, show_context
    from rag_core.errors import ConfigError

    if model is not None:
        show_context(model, index, questions, trust_remote_code=trust_remote_code)
    elif index is not None or questions is not None:
        raise ConfigError("--index and --questions choose the context that --model shows. Give --model, too.")
    else:
        raise typer.Exit(examine())
