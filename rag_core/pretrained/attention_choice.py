"""Which attention function a Transformers model uses: the private attribute that says so, in one place.

Transformers reads `config._attn_implementation` at every call. Its public `model.set_attn_implementation` does more:
it checks and replaces the setting of all submodules and takes milliseconds, too long for each decoding step.
`tests/project/test_internals.py` says when an upgrade has moved the attribute.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any


def can_choose_attention(model: Any) -> bool:
    """Whether the model's attention can be replaced (LED's, for example, cannot)."""
    return bool(type(model)._can_set_attn_implementation())


def attention_of(config: Any) -> str:
    """The name of the attention function."""
    return str(config._attn_implementation)


@contextlib.contextmanager
def attention_chosen(configs: Sequence[Any], name: str) -> Iterator[None]:
    """Models with these configurations use the attention function called `name` inside the block."""
    before = [config._attn_implementation for config in configs]
    for config in configs:
        config._attn_implementation = name
    try:
        yield
    finally:
        for config, usual in zip(configs, before, strict=True):
            config._attn_implementation = usual
