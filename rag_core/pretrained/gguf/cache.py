"""Keep the plain folder of each GGUF file in a cache: `RAG_CACHE/gguf/KEY/`, an artifact with a manifest.

KEY is a hash of the file's content and of the program that read it, so a changed file or another Transformers gives
another folder. One process makes a folder while others wait for it, a killed process leaves nothing that counts, and a
damaged folder is made again.
"""

from __future__ import annotations

import math
import shutil
import warnings
from pathlib import Path

import transformers

from rag_core.errors import ArtifactError, ConfigError, ModelNotice
from rag_core.pretrained.gguf.conversion import write_plain_folder
from rag_core.pretrained.gguf.file import GgufFile
from rag_core.storage.artifact import open_artifact, publish, sha256_of_file, stage_key
from rag_core.storage.places import cache_root
from rag_core.storage.writer_lock import reserved

KIND = "gguf"
# Raise it when `conversion.py` writes another folder for the same file.
CONVERSION = 1

# In this process: the SHA-256 of files by path, size, time and inode; and the folders whose content was checked.
_known_content: dict[tuple[str, int, int, int], str] = {}
_checked: set[Path] = set()


def plain_folder(file: Path, name: str) -> Path:
    """The plain model folder of a GGUF file; made if the cache does not have it, which a notice says.

    Args:
        file: the GGUF file.
        name: the source as the user gave it, for messages.

    Raises:
        ConfigError: the file cannot be read, is damaged or no GGUF file, or holds no generator that Transformers can
            read; or the cache cannot be written.

    Warns:
        ModelNotice: the file is being dequantised.
    """
    config = {"conversion": CONVERSION, "transformers": transformers.__version__}
    made_from = {"gguf": _content_of(file, name)}
    key = stage_key(KIND, config, made_from)
    folder = cache_root() / "gguf" / key[:16]
    if _is_whole(folder, key):
        return folder
    try:
        with reserved(folder, math.inf):
            if not _is_whole(folder, key):  # another process may have made it meanwhile
                _make(GgufFile.open(file, name), folder, config, made_from)
                _checked.add(folder)
    except (ArtifactError, OSError) as error:
        raise ConfigError(
            f"{name} cannot be dequantised into the cache {folder.parent} ({error.__cause__ or error}). Make room "
            "there or make it writable, or set RAG_CACHE to another folder."
        ) from error
    return folder


def _content_of(file: Path, name: str) -> str:
    """The file's SHA-256, read once a process."""
    try:
        status = file.stat()
        place = (str(file.resolve()), status.st_size, status.st_mtime_ns, status.st_ino)
        if place not in _known_content:
            _known_content[place] = sha256_of_file(file)
    except OSError as error:
        raise ConfigError(f"{name} cannot be read ({error.strerror}: {file}). Check the permissions.") from error
    return _known_content[place]


def _is_whole(folder: Path, key: str) -> bool:
    """Whether the folder is there and undamaged. Its content is read once a process, sizes are compared each time."""
    try:
        whole = open_artifact(folder, KIND, check_content=folder not in _checked).key == key
    except ArtifactError:
        return False
    _checked.add(folder)
    return whole


def _make(source: GgufFile, folder: Path, config: dict[str, object], made_from: dict[str, str]) -> None:
    _check_room(source, folder)
    before = f"its copy {folder} is damaged; " if folder.exists() else ""
    warnings.warn(
        f"{source.name}: {before}dequantising it into {folder} (once; {_size(source.bytes_when_plain)} in float32) …",
        ModelNotice,
        stacklevel=4,
    )
    shutil.rmtree(folder, ignore_errors=True)
    with publish(folder, KIND, config=config, made_from=made_from) as draft:
        draft.details["gguf"] = source.name
        write_plain_folder(source, draft.folder)


def _check_room(source: GgufFile, folder: Path) -> None:
    place = next(parent for parent in folder.absolute().parents if parent.exists())
    free = shutil.disk_usage(place).free
    if source.bytes_when_plain > free:
        raise ConfigError(
            f"The disk of the cache {folder.parent} is full: {source.name} needs {_size(source.bytes_when_plain)} "
            f"there in float32, {_size(free)} are free. Make room, or set RAG_CACHE to a folder on a larger disk."
        )


def _size(number: int) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e8 else f"{number / 1e6:.1f} MB"
