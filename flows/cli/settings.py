"""YAML files to typed settings, with errors that name the file, the field and what was expected."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from rag_core.errors import ConfigError, InputError

Settings = TypeVar("Settings", bound=BaseModel)
# PyYAML reads about 100 kB a second; a configuration has one or two.
MOST_BYTES = 100_000
MOST_MERGED = 1_000
# Besides its own errors PyYAML raises these: for text that is not UTF-8, for a date or number that is none (2001-99-99), for
# a tag that does not fit its value (!!bool x, !!int "", !!timestamp x), and for very deep nesting.
_NOT_YAML = (yaml.YAMLError, ValueError, KeyError, IndexError, AttributeError, TypeError, OverflowError, RecursionError)


class _Loader(yaml.SafeLoader):
    """YAML that says one thing for each key, and whose merges (`<<`) stay small whatever they are nested in."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} stands twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        if len(node.value) > MOST_MERGED:
            raise yaml.constructor.ConstructorError(None, None, "merges (<<) of too many keys", node.start_mark)


def read_yaml(file: Path) -> dict[str, object]:
    """A YAML file's top-level mapping.

    Raises:
        InputError: missing, too large, not UTF-8, not YAML, a key that stands twice, or not a mapping.
    """
    if not file.is_file():
        raise InputError(f"There is no configuration file {file}. configs/demo.yaml is an example of one.")
    if file.stat().st_size > MOST_BYTES:
        raise InputError(
            f"{file} has {file.stat().st_size:,} bytes; a configuration of at most {MOST_BYTES:,} was expected. "
            "configs/demo.yaml is an example of one."
        )
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), _Loader)  # noqa: S506  # nosec B506
    except _NOT_YAML as error:
        raise InputError(f"{file} is not readable as YAML: {' '.join(str(error).split())}. Correct it.") from error
    if not isinstance(content, dict):
        raise InputError(f"{file} must hold sections such as `model:` and `train:`; found {type(content).__name__}.")
    return content


def read_section(file: Path, *names: str) -> dict[str, Any]:
    """A section of a YAML file, such as ("train", "optimizer"), to be changed; empty where the file has none.

    Raises:
        InputError: as `read_yaml`.
        ConfigError: the section is no mapping.
    """
    found: Any = read_yaml(file)
    for name in names:
        found = found.get(name)
        found = {} if found is None else found
        if not isinstance(found, dict):
            raise ConfigError(
                f"{file}, section `{name}`: settings such as `name: value` were expected, found {found!r:.80}. Correct it."
            )
    return dict(found)


def parse(settings: type[Settings], content: object, where: str) -> Settings:
    """Content to typed settings; ConfigError lists what is wrong in one paragraph."""
    try:
        return settings.model_validate(content)
    except ValidationError as error:
        raise ConfigError(f"{where}: {explain(error)}") from error


def explain(error: ValidationError) -> str:
    """Pydantic's findings as one sentence each."""
    return " ".join(f"{'.'.join(str(part) for part in one['loc']) or 'value'}: {one['msg']}." for one in error.errors())
