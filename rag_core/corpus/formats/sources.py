"""Expands a list of sources to files: folders in one fixed order, bad sources refused before anything is read.

A folder means all its files (recursively) with the suffix of the format. Files and folders whose name starts with
a dot are left out: they belong to editors and version control. A file that is named directly is read whatever its
suffix, except with format `text`, where a PDF would yield rubbish.

Without a named format, a folder means its files of records; if it has none, its text files; else its files without
suffix. Of a folder with BEIR's `corpus`, `queries` and `qrels`, only the corpus is read. This module opens no files.
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
NO_SUFFIX = "no suffix"  # such as WikiExtractor's files: AA/wiki_00
# For a folder, the first group with any file is read: a README beside records is not a passage.
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
# Names of BEIR's files and folders that lie beside its `corpus` and have its layout, but hold no passages.
NOT_THE_CORPUS = ("queries", "qrels")


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file to read, and its POSIX path relative to the source folder (its file name if it was named directly)."""

    path: Path
    name: str


def expand_sources(sources: Sequence[Path], format: CorpusFormat) -> list[SourceFile]:
    """All files of the sources: sources in the order given, the files of a folder sorted by name.

    Raises:
        ConfigError: unknown format.
        InputError: a source is missing, unreadable, or a folder without files of the format; or two text files have the
            same name.
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
    """Whether a file is plain text. Only its name can tell."""
    return path.name.lower().endswith(SUFFIXES["text"])


def _expand(source: Path, format: CorpusFormat) -> list[SourceFile]:
    choices = AUTO_SUFFIXES if format == "auto" else (SUFFIXES[format],)
    wanted = " or ".join(suffix for suffixes in choices for suffix in suffixes if suffix != NO_SUFFIX)
    if not source.exists():
        raise InputError(
            f"{source} does not exist; a {format} file or a folder of {wanted} files was expected. Correct the path."
        )
    if source.is_dir():
        groups = (sorted(_files_below(source, suffixes), key=lambda file: file.name) for suffixes in choices)
        files = next((files for files in groups if files), [])
        files = _without_beirs_questions(files) if format == "auto" else files
        if not files:
            raise InputError(
                f"{source} holds no {wanted} file, as format {format!r} expects. Correct the path or the format."
            )
    elif format == "text" and not is_text(source):
        raise InputError(
            f"{source} is not a {wanted} file. Convert it to plain text first, or name the format that it has."
        )
    else:
        files = [SourceFile(source, source.name)]
        if format == "auto" and _has_name(files[0], NOT_THE_CORPUS):
            raise InputError(
                f"{source} is BEIR's {source.name.partition('.')[0]} by its name: give it as --questions. If it holds "
                "passages, name its format."
            )
    for file in files:
        if not os.access(file.path, os.R_OK):
            raise InputError(f"{file.path} cannot be read: no permission. Grant it, or leave the file out.")
    return files


def _files_below(folder: Path, suffixes: tuple[str, ...]) -> list[SourceFile]:
    files = []
    for path in folder.rglob("*"):
        relative = path.relative_to(folder)
        name = path.name.lower() if path.suffix else NO_SUFFIX
        if name.endswith(suffixes) and not any(part.startswith(".") for part in relative.parts) and path.is_file():
            files.append(SourceFile(path, relative.as_posix()))
    return files


def _without_beirs_questions(files: list[SourceFile]) -> list[SourceFile]:
    """If a file or folder is named `corpus`, the files without BEIR's queries and judgements; else all files."""
    if not any(_has_name(file, ("corpus",)) for file in files):
        return files
    return [file for file in files if not _has_name(file, NOT_THE_CORPUS)]


def _has_name(file: SourceFile, names: tuple[str, ...]) -> bool:
    """Whether the file, or a folder above it, has one of the names, whatever its suffix."""
    return any(part.lower().split(".")[0] in names for part in Path(file.name).parts)


def _refuse_equal_names(files: list[SourceFile]) -> None:
    """Raise InputError if two text files have the same name: passage ids come from names, so ids would clash."""
    seen: dict[str, Path] = {}
    for file in files:
        if file.name in seen:
            raise InputError(
                f"{seen[file.name]} and {file.path} would both get passage ids that start with {file.name!r}. "
                "Give their common folder as the one source, or rename one of them."
            )
        seen[file.name] = file.path
