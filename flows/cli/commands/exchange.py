"""Commands that convert models: export (adapters merged), import-hf and export-hf (Hugging Face's RAG classes)."""

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
    for command in (export, import_hf, export_hf):
        app.command(rich_help_panel="Exchange")(command)


def export(
    model: Annotated[Path, typer.Argument(help="RAG model folder, as `rag train` writes it.", metavar="MODEL")],
    out: Annotated[Path, typer.Option("--out", help="RAG model folder to write. It appears complete or not at all.")],
    dtype: Annotated[
        str, typer.Option(help="float32 | bfloat16: how the generator's weights are written.")
    ] = "float32",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Write a RAG model with its LoRA adapters merged into the generator's weights, so that it needs no base.

    OUT/question_encoder and OUT/generator are plain Transformers folders
    (AutoModel…from_pretrained), and OUT is a RAG model that ask, infer and
    train read like any other.
    """
    from rag_core.model.adapters.adapter_files import GeneratorType
    from rag_core.model.rag_model import RagModel
    from rag_core.storage.places import absolute

    if dtype not in get_args(GeneratorType):
        raise ConfigError(f"Unknown dtype {dtype!r}. Give one of {', '.join(get_args(GeneratorType))}.")
    loaded = RagModel.from_pretrained(model, trust_remote_code=trust_remote_code)
    loaded.export(out, dtype=dtype, source=absolute(model))  # type: ignore[arg-type]
    console.print(f"export: the generator in {dtype}, adapters merged → {out}")


def import_hf(
    source: Annotated[
        str,
        typer.Argument(
            help="Folder, hub name (facebook/rag-token-nq[@REVISION]) or package:NAME/FOLDER.", metavar="SOURCE"
        ),
    ],
    folder: Annotated[Path, typer.Argument(help="RAG model folder to write.", metavar="FOLDER")],
    pooling: Annotated[
        str | None, typer.Option(help="mean, cls, …: needed if the question encoder is not DPR's.")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Make a RAG model folder from a Hugging Face RAG checkpoint.

    SOURCE has config.json with model_type "rag", weights (model.safetensors
    or pytorch_model.bin), and question_encoder_tokenizer/ and
    generator_tokenizer/, as RagTokenizer.save_pretrained writes them. Give
    FOLDER as --model to ask, infer and retrieve. Embed the passages with the
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
    folder: Annotated[Path, typer.Argument(help="New or empty folder to write.", metavar="FOLDER")],
    variant: Annotated[
        str | None,
        typer.Option(help="sequence | token: the class that loads it; default: as the model was trained."),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Write a RAG model as a Hugging Face checkpoint.

    RagSequenceForGeneration or RagTokenForGeneration and RagTokenizer load
    FOLDER (from_pretrained), and give the same loss for the same contexts and
    scores; `rag import-hf` reads it too. A note says what those classes do
    differently with this model.
    """
    from rag_core.model.rag_model import RagModel

    parsed_variant = parse_variant(variant)
    with _notes():
        loaded = RagModel.from_pretrained(model, trust_remote_code=trust_remote_code)
        loaded.to_hf_rag(folder, variant=parsed_variant)
    name = {"sequence": "RagSequenceForGeneration", "token": "RagTokenForGeneration"}[loaded.variant_or(parsed_variant)]
    console.print(f"export-hf: {name} → {folder}")


@contextlib.contextmanager
def _notes() -> Iterator[None]:
    """Print each warning about the exchange as one line, without Python's file and line."""
    from rag_core.model.hf_rag import ExchangeWarning

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ExchangeWarning)
        yield
    for warning in caught:
        if issubclass(warning.category, ExchangeWarning):
            typer.echo(f"Note: {warning.message}", err=True)
        else:
            warnings.showwarning(warning.message, warning.category, warning.filename, warning.lineno)
