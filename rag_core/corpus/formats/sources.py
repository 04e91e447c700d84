"""Which files a list of sources means: folders expanded in one fixed order, bad sources refused before any reading.

A folder stands for all its files (recursively) with the suffix of the format; files and folders whose name starts
with a dot are left out, since they are editors' and version control's. A file named outright is taken whatever its
suffix, save for `text`, where reading a PDF as text would yield rubbish. Where no format is named, a folder stands for its
files of records, or, if it has none, for its text, or else for its files without suffix; a folder with BEIR's `corpus`, `queries` and `qrels` for its corpus alone.
This module does not look into files.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from rag_core.errors import ConfigError, InputError

CorpusFormat = Literal["auto", "jsonl", "json", "dpr-tsv", "csv", "parquet", "squad", "text"]

SUFFIXES: dict[CorpusFormat, tuple[str, ...]] = {
    "jsonl": (".jsonl", ".jsonl.gz"),
    "json": (".json", ".json.gz"),
    "dpr-tsv": (".tsv", ".tsv.gz"),
    "csv": (".csv", ".csv.gz"),
    "parquet": (".parquet",),
    "squad": (".json",),
    "text": (".txt", ".md"),
}
NO_SUFFIX = "no suffix"  # as WikiExtractor's files: AA/wiki_00
# Of a folder, the first of these that any of its files have: a README beside records is no passage.
AUTO_SUFFIXES = (
    (
        *SUFFIXES["jsonl"],
        ".ndjson",
        ".ndjson.gz",
        *SUFFIXES["json"],
        *SUFFIXES["dpr-tsv"],
        *SUFFIXES["csv"],
        ".parquet",
    ),
    SUFFIXES["text"],
    (NO_SUFFIX,),
)
# Names of files and folders beside a `corpus` that have its layout but are no passages (BEIR).
NOT_THE_CORPUS = ("queries", "qrels")


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file to read, and its POSIX path relative to the source folder (the file name if it was named outright)."""

    path: Path
    name: str


def expand_sources(sources: Sequence[Path], format: CorpusFormat) -> list[SourceFile]:
    """All files that `sources` stand for: sources in the order given, the files of a folder sorted by name.

    Raises:
        ConfigError: unknown format.
        InputError: a source is missing, unreadable or a folder without fitting files; or (text) two have one name.
    """
    if format not in get_args(CorpusFormat):
        known = ", ".join(get_args(CorpusFormat))
        raise ConfigError(f"Corpus format {format!r} is unknown; the known ones are {known}. Correct `format`.")
    files = [file for source in sources for file in _expand(Path(source), format)]
    if not files:
        raise InputError("No source was given for the corpus. Name at least one file or folder.")
    if format in ("text", "auto"):
        _refuse_equal_names([file for file in files if format == "text" or is_text(file.path)])
    return files


def is_text(path: Path) -> bool:
    """Whether a file is plain text by its name, which is all that tells it."""
    return path.name.lower().endswith(SUFFIXES["text"])


def _expand(source: Path, format: CorpusFormat) -> list[SourceFile]:
    choices = AUTO_SUFFIXES if format == "auto" else (SUFFIXES[format],)
    wanted = " or ".join(suffix for suffixes in choices for suffix in suffixes if suffix != NO_SUFFIX)
    if not source.exists():
        raise InputError(
            f"{source} does not exist; a {format} file or a folder of {wanted} files was expected. Correct the path."
        )
    if source.is_dir():
        below = (sorted(_files_below(source, suffixes), key=lambda file: file.name) for suffixes in choices)
        files = next((files for files in below if files), [])
        files = _the_corpus(files) if format == "auto" else files
        if not files:
            raise InputError(
                f"{source} holds no {wanted} file, as format {format!r} expects. Correct the path or the format."
            )
    elif format == "text" and not is_text(source):
        raise InputError(
            f"{source} is not a {wanted} file. Convert it to plain text first, or give the fitting format."
        )
    else:
        files = [SourceFile(source, source.name)]
        if format == "auto" and _is_called(files[0], NOT_THE_CORPUS):
            raise InputError(
                f"{source} is BEIR's {source.name.partition('.')[0]} by its name: give it as --questions. If it holds "
                "passages, name its format."
            )
    for file in files:
        if not os.access(file.path, os.R_OK):
            raise InputError(f"{file.path} cannot be read: no permission. Grant it, or leave the file out.")
    return files


def _files_below(folder: Path, suffixes: tuple[str, ...]) -> list[SourceFile]:
    found = []
    for path in folder.rglob("*"):
        relative = path.relative_to(folder)
        name = path.name.lower() if path.suffix else NO_SUFFIX
        if name.endswith(suffixes) and not any(part.startswith(".") for part in relative.parts) and path.is_file():
            found.append(SourceFile(path, relative.as_posix()))
    return found


def _the_corpus(files: list[SourceFile]) -> list[SourceFile]:
    """The files without those of queries and judgements, if one of them is called, or is below a folder called, corpus."""

    if not any(_is_called(file, ("corpus",)) for file in files):
        return files
    return [file for file in files if not _is_called(file, NOT_THE_CORPUS)]


def _is_called(file: SourceFile, names: tuple[str, ...]) -> bool:
    return any(part.lower().split(".")[0] in names for part in Path(file.name).parts)


def _refuse_equal_names(files: list[SourceFile]) -> None:
    """Passage ids of text are made from the names, so equal names would make the second file's passages duplicates."""
    seen: dict[str, Path] = {}
    for file in files:
        if file.name in seen:
            raise InputError(
                f"{seen[file.name]} and {file.path} would both get passage ids that start with {file.name!r}. "
                "Give their common folder as the one source, or rename one of them."
            )
        seen[file.name] = file.path
