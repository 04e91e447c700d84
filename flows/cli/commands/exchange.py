"""Commands that exchange models with Hugging Face's RAG classes: import-hf and export-hf."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, get_args

import typer

from flows.cli.options import TrustRemoteCode
from flows.cli.printing import console, parse_variant
from rag_core.errors import ConfigError


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    for command in (import_hf, export_hf):
        app.command(rich_help_panel="Exchange")(command)


def import_hf(
    source: Annotated[
        str,
        typer.Argument(
            help="Folder, hub name (facebook/rag-token-nq[@REVISION]) or package:NAME/FOLDER.", metavar="SOURCE"
        ),
    ],
    folder: Annotated[Path, typer.Argument(help="RAG model folder that is written.", metavar="FOLDER")],
    pooling: Annotated[
        str | None, typer.Option(help="mean, cls, …: for a question encoder other than DPR's; DPR needs none.")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Make a RAG model folder from a Hugging Face RAG checkpoint.

    SOURCE holds config.json with model_type "rag", weights (model.safetensors
    or pytorch_model.bin), and question_encoder_tokenizer/ and
    generator_tokenizer/, as RagTokenizer.save_pretrained writes them. The result
    is used as --model by ask, infer and retrieve. Embed the passages with the
    document encoder that the checkpoint was trained with.
    """
    from rag_core.embeddings.encoder_settings import Pooling
    from rag_core.model.rag_model import RagModel
    from rag_core.pretrained.model_source import recorded_source

    if pooling not in (None, *get_args(Pooling)):
        raise ConfigError(f"Unknown pooling {pooling!r}. Give one of {', '.join(get_args(Pooling))}.")
    with _notes():
        model = RagModel.from_hf_rag(source, pooling=pooling, trust_remote_code=trust_remote_code)  # type: ignore[arg-type]
        model.save_pretrained(
            folder, made_from={"hf_rag": model.fingerprint()}, details={"hf_rag": recorded_source(source)}
        )
    variant = f"RAG-{model.settings.variant.capitalize()}" if model.settings.variant else "no variant"
    console.print(f"import-hf: {variant}, {model.settings.num_docs} passages per question → {folder}")


def export_hf(
    model: Annotated[Path, typer.Argument(help="RAG model folder, as `rag train` writes it.", metavar="MODEL")],
    folder: Annotated[Path, typer.Argument(help="New or empty folder that is written.", metavar="FOLDER")],
    variant: Annotated[
        str | None,
        typer.Option(help="sequence | token: the class it is for; default: what the model was trained as."),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Write a RAG model as a Hugging Face checkpoint.

    FOLDER is then read by RagSequenceForGeneration or RagTokenForGeneration
    and by RagTokenizer (from_pretrained), with the same loss for the same
    contexts and scores, and by `rag import-hf`. What those classes would do
    otherwise with this model is told as a note.
    """
    from rag_core.model.rag_model import RagModel

    chosen = parse_variant(variant)
    with _notes():
        loaded = RagModel.from_pretrained(model, trust_remote_code=trust_remote_code)
        loaded.to_hf_rag(folder, variant=chosen)
    name = {"sequence": "RagSequenceForGeneration", "token": "RagTokenForGeneration"}[loaded.variant_or(chosen)]
    console.print(f"export-hf: {name} → {folder}")


@contextlib.contextmanager
def _notes() -> Iterator[None]:
    """Print what was warned of as a line each, without Python's file and line."""
    from rag_core.model.hf_rag import ExchangeWarning

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ExchangeWarning)
        yield
    for one in caught:
        if issubclass(one.category, ExchangeWarning):
            typer.echo(f"Note: {one.message}", err=True)
        else:
            warnings.showwarning(one.message, one.category, one.filename, one.lineno)
