"""Gradient checkpointing: keep only each layer's input, and run the layer again in the backward pass.

This trades a second forward pass for memory. Loss and gradients keep every bit: a layer's second pass uses the same CPU
kernels (`rag_core/cpu/training_kernels.py`) and the same random draws (`repeated_draws`).
"""

from __future__ import annotations

from typing import Any

from rag_core.errors import ConfigError
from rag_core.training.own_draws import repeated_draws


def recompute_layers(model: Any) -> None:
    """Switch gradient checkpointing on, in training mode, for a Transformers model.

    Raises:
        ConfigError: the model does not support it.
    """
    options = {"use_reentrant": False, "context_fn": repeated_draws}
    try:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    except ValueError as error:
        raise ConfigError(
            f"train.gradient_checkpointing is set, but Transformers cannot run the layers of the generator "
            f"({type(model).__name__}) again ({error}). Remove gradient_checkpointing, or choose another generator."
        ) from error
    # Transformers asks for a gradient of the embeddings' output, which only the older, reentrant kind needs.
    model.disable_input_require_grads()
