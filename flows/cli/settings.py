"""YAML files to typed settings, with errors that name the file, the field and what was expected."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from rag_core.errors import ConfigError, InputError

Settings = TypeVar("Settings", bound=BaseModel)


def read_yaml(file: Path) -> dict[str, object]:
    """A YAML file's top-level mapping.

    Raises:
        InputError: missing, not UTF-8, not YAML, or not a mapping.
    """
    if not file.is_file():
        raise InputError(f"There is no configuration file {file}. configs/demo.yaml is an example of one.")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{file} is not readable as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise InputError(f"{file} must hold sections such as `model:` and `train:`; found {type(content).__name__}.")
    return content


def parse(settings: type[Settings], content: object, where: str) -> Settings:
    """Content to typed settings; ConfigError lists what is wrong in one paragraph."""
    try:
        return settings.model_validate(content)
    except ValidationError as error:
        raise ConfigError(f"{where}: {explain(error)}") from error


def explain(error: ValidationError) -> str:
    """Pydantic's findings as one sentence each."""
    return " ".join(f"{'.'.join(str(part) for part in one['loc']) or 'value'}: {one['msg']}." for one in error.errors())
