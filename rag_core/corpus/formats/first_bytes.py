"""Checks a file's first bytes before it is parsed: archives, other encodings, gzip.

Gzip is decompressed while it is read; every other archive is refused. Nothing is ever unpacked to disk, so a path
inside an archive can do no harm.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from rag_core.errors import InputError

_GZIP = b"\x1f\x8b"
# Offset, magic bytes, kind of file.
_ARCHIVES = (
    (0, b"PK\x03\x04", "a zip archive"),
    (0, b"PK\x05\x06", "a zip archive"),
    (0, _GZIP, "compressed with gzip"),
    (4, b"1AY&SY", "compressed with bzip2"),
    (0, b"\xfd7zXZ\x00", "compressed with xz"),
    (0, b"\x28\xb5\x2f\xfd", "compressed with zstd"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (0, b"Rar!\x1a\x07", "a rar archive"),
    (257, b"ustar", "a tar archive"),
)
# UTF-32 first: its byte order mark begins with UTF-16's.
_ENCODINGS = {
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
_HEAD_BYTES = 512
# Common files that cannot be read as records: magic bytes, kind of file, remedy.
_OTHER_FILES = (
    (b"%PDF", "a PDF", "Convert it to text first"),
    (b"\xd0\xcf\x11\xe0", "an old Word or Excel file", "Write it as text or CSV"),
    (b"ARROW1", "an Arrow file", "Write it as Parquet"),
    (b"\xff\xff\xff\xff", "an Arrow stream, as datasets' save_to_disk writes it", "Write it as Parquet (to_parquet)"),
    (b"SQLite format 3", "an SQLite database", "Write its passages as JSON Lines"),
    (b"\x80\x04\x95", "a pickle, which is never opened", "Write it as JSON Lines"),
    (b"\x80\x03", "a pickle, which is never opened", "Write it as JSON Lines"),
)


def refuse_archives_and_utf16(path: Path, *, gzip_too: bool = True) -> None:
    """Raise InputError if the file is an archive, compressed, or text in UTF-16 or UTF-32.

    Args:
        path: a file that can be opened.
        gzip_too: whether gzip is refused as well.
    """
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    kind = next((kind for offset, magic, kind in _ARCHIVES if head.startswith(magic, offset)), None)
    if kind and (gzip_too or not head.startswith(_GZIP)):
        raise InputError(f"{path} is {kind}; the plain file was expected. Unpack it and name the file that was in it.")
    encoding = next((name for bom, name in _ENCODINGS.items() if head.startswith(bom)), None)
    if encoding:
        raise InputError(
            f"{path} is text in {encoding}; UTF-8 was expected. Convert it: "
            f"iconv -f {encoding} -t UTF-8 {path.name} > {path.stem}.utf8{path.suffix}"
        )


def refuse_other_files(path: Path) -> None:
    """Raise InputError if the file is of a kind that no reader supports, such as a PDF."""
    with path.open("rb") as file:
        head = file.read(16)
    for magic, kind, remedy in _OTHER_FILES:
        if head.startswith(magic):
            raise InputError(f"{path} is {kind}; JSON Lines, JSON, Parquet, CSV or text was expected. {remedy}.")


@contextmanager
def open_lines(path: Path) -> Iterator[BinaryIO]:
    """Open the file for reading by lines; gzip is decompressed on the way.

    Raises:
        InputError: another archive, text in UTF-16 or UTF-32, or (while reading) a cut or damaged gzip stream.
    """
    refuse_archives_and_utf16(path, gzip_too=False)
    with path.open("rb") as file:
        if file.read(2) != _GZIP:
            file.seek(0)
            yield file
            return
        file.seek(0)
        try:
            with gzip.open(file, "rb") as unpacked:
                yield unpacked  # type: ignore[misc]
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise InputError(
                f"{path} is cut or damaged gzip ({error}). Copy or download it again; `gzip -t` checks it."
            ) from error
