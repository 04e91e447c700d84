"""Reads YAML files into typed settings; errors name the file, the field and the expected value."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from rag_core.errors import ConfigError, InputError

Settings = TypeVar("Settings", bound=BaseModel)
# PyYAML reads about 100 kB per second; a configuration has one or two kB.
MOST_BYTES = 100_000
MOST_MERGED = 1_000
# PyYAML's own errors, and those it lets through: text that is not UTF-8, an impossible date or number
# (2001-99-99), a tag that does not fit its value (!!bool x, !!int "", !!timestamp x), and very deep nesting.
_NOT_YAML = (yaml.YAMLError, ValueError, KeyError, IndexError, AttributeError, TypeError, OverflowError, RecursionError)


class _Loader(yaml.SafeLoader):
    """A YAML loader that refuses duplicate keys, and merges (`<<`) that add up to too many keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} appears twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        if len(node.value) > MOST_MERGED:
            raise yaml.constructor.ConstructorError(None, None, "merges (<<) of too many keys", node.start_mark)


def read_yaml(file: Path) -> dict[str, object]:
    """Read a YAML file's top-level mapping.

    Raises:
        InputError: the file is missing, too large, not UTF-8, not YAML, not a mapping, or has a key twice.
    """
    if not file.is_file():
        raise InputError(f"There is no configuration file {file}. See configs/demo.yaml for an example.")
    if file.stat().st_size > MOST_BYTES:
        raise InputError(
            f"{file} has {file.stat().st_size:,} bytes; a configuration of at most {MOST_BYTES:,} was expected. "
            "See configs/demo.yaml for an example."
        )
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), _Loader)  # noqa: S506  # nosec B506
    except _NOT_YAML as error:
        raise InputError(f"{file} cannot be read as YAML: {' '.join(str(error).split())}. Correct it.") from error
    if not isinstance(content, dict):
        raise InputError(f"{file} must hold sections such as `model:` and `train:`; found {type(content).__name__}.")
    return content


def read_section(file: Path, *names: str) -> dict[str, Any]:
    """Read a section of a YAML file, such as ("train", "optimizer"); {} if the file has no such section.

    The result is a copy, which the caller may change.

    Raises:
        InputError: the file cannot be read, as in `read_yaml`.
        ConfigError: the section is not a mapping.
    """
    section: Any = read_yaml(file)
    for name in names:
        section = section.get(name)
        section = {} if section is None else section
        if not isinstance(section, dict):
            raise ConfigError(
                f"{file}, section `{name}`: expected settings such as `name: value`, found {section!r:.80}. Correct it."
            )
    return dict(section)


def parse(settings: type[Settings], content: object, where: str) -> Settings:
    """Turn content into typed settings; ConfigError lists all problems in one paragraph."""
    try:
        return settings.model_validate(content)
    except ValidationError as error:
        raise ConfigError(f"{where}: {explain(error)}") from error


def explain(error: ValidationError) -> str:
    """A sentence for each problem that Pydantic found."""
    return " ".join(
        f"{'.'.join(str(part) for part in problem['loc']) or 'value'}: {problem['msg']}." for problem in error.errors()
    )
