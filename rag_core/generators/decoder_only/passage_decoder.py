"""A decoder-only generator, stepped over contexts that are read once.

Each context stores its keys and values once (`shared_attention.py`). Models whose layers cannot share them (linear
attention, state spaces, attention sinks, ALiBi inside their own attention) get a copy for every hypothesis. Their
contexts are read in groups of equal length, so that no state ever sees padding.

Legend: N contexts, n contexts of a group, S context tokens, w width of a group, W hypotheses of each context,
R rows (N·W), T answer tokens, h heads of keys, d dimensions of a head, V vocabulary.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache

from rag_core.errors import ConfigError
from rag_core.generators.decoder_only.layout import Rows
from rag_core.generators.decoder_only.shared_attention import (
    NotShareableError,
    SharedContexts,
    can_share,
    can_share_layers,
)
from rag_core.generators.generation_tokens import GenerationTokens
from rag_core.generators.grouping import groups_by_width
from rag_core.generators.token_log_probs import projected_only_at

# Slots for the hypotheses' tokens that are made together with the contexts'.
_ROOM = 64


class DecoderOnlyPassageDecoder:
    """The `PassageDecoder` of a causal language model.

    Args:
        model: a transformers causal language model.
        tokens: its special tokens.
        contexts: tokens of the contexts.
        use_cache: False reads context and answer again at every step: slower, with the same result.

    Raises:
        ConfigError: the model keeps its state in a cache of another kind than Transformers' `Cache`.
    """

    def __init__(self, model: Any, tokens: GenerationTokens, contexts: Rows, *, use_cache: bool = True) -> None:
        self.tokens = tokens
        self._model, self._contexts = model, contexts
        self._rows: _Rows
        if not use_cache:
            self._start: _Start = _UncachedStart(model, contexts)
        else:
            self._start = _read_to_share(model, contexts) or _CopiedStart(model, contexts)
        self.first_logits_NV = self._start.first_logits_NV
        self.restart()

    @property
    def device(self) -> torch.device:
        return self._contexts.lengths_N.device

    def restart(self, contexts_n: Tensor | None = None) -> None:
        self._rows = self._start.rows()
        self._stepped = False
        if contexts_n is not None:
            self._rows.select(contexts_n)
        self._kept = contexts_n

    def select(self, contexts_n: Tensor) -> None:
        self._rows.select(contexts_n)
        if not self._stepped:
            self._kept = contexts_n if self._kept is None else self._kept[contexts_n]

    def step(self, tokens_NW: Tensor, parents_NW: Tensor) -> Tensor:
        try:
            logits_NWV = self._rows.step(tokens_NW, parents_NW)
        except NotShareableError:
            # Only a model's attention knows what it is called with, so this shows at the first step.
            self._start = _CopiedStart(self._model, self._contexts)
            self._rows = self._start.rows()
            if self._kept is not None:
                self._rows.select(self._kept)
            logits_NWV = self._rows.step(tokens_NW, parents_NW)
        self._stepped = True
        return logits_NWV


class _Rows(Protocol):
    """The state of the hypotheses; arguments as in `generator.PassageDecoder`."""

    def select(self, contexts_n: Tensor) -> None: ...
    def step(self, tokens_NW: Tensor, parents_NW: Tensor) -> Tensor: ...


class _Start(Protocol):
    """Contexts that have been read."""

    first_logits_NV: Tensor

    def rows(self) -> _Rows: ...


def _last_logits(model: Any, input_ids_nw: Tensor, lengths_n: Tensor, **options: Any) -> Tensor:
    """Logits (n, V) at each row's last token."""
    rows_n = torch.arange(len(input_ids_nw), device=input_ids_nw.device)
    with projected_only_at(model, rows_n, lengths_n - 1):
        logits_nV: Tensor = model(input_ids=input_ids_nw, **options).logits
    return logits_nV


# --- Keys and values stored once per context


def _read_to_share(model: Any, contexts: Rows) -> _SharedStart | None:
    """Read the contexts and keep keys and values once per context; None if the model's layers cannot share them."""
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    return _SharedStart.read(model, contexts) if can_share(model) and takes_positions else None


class _SharedStart:
    """Keys and values of all contexts, in one buffer per layer and side."""

    def __init__(
        self, model: Any, contexts: Rows, layers: Sequence[tuple[Tensor, Tensor]], first_logits_NV: Tensor
    ) -> None:
        self._model, self._contexts, self._layers = model, contexts, layers
        self.first_logits_NV = first_logits_NV

    @classmethod
    def read(cls, model: Any, contexts: Rows) -> _SharedStart | None:
        """Read the contexts in groups of like length; None if a layer keeps anything but all keys and values."""
        N, S = contexts.input_ids_NX.shape
        widths: list[int] = contexts.lengths_N.tolist()
        layers: list[tuple[Tensor, Tensor]] = []
        logits_NV = torch.empty(0)
        for group in groups_by_width(widths):
            rows_n = torch.tensor(group, device=contexts.lengths_N.device)
            cache: Any = DynamicCache()
            w = widths[group[0]]
            ids_nw, lengths_n = contexts.input_ids_NX[rows_n, :w], contexts.lengths_N[rows_n]
            logits_nV = _last_logits(model, ids_nw, lengths_n, past_key_values=cache, use_cache=True)
            if not can_share_layers(cache.layers):
                return None
            if not layers:
                layers = [(_buffer(layer.keys, N, S), _buffer(layer.values, N, S)) for layer in cache.layers]
                logits_NV = logits_nV.new_empty(N, logits_nV.shape[1])
            logits_NV[rows_n] = logits_nV
            for (keys_NhPd, values_NhPd), layer in zip(layers, cache.layers, strict=True):
                keys_NhPd[rows_n, :, :w] = layer.keys.to(keys_NhPd.dtype)
                values_NhPd[rows_n, :, :w] = layer.values.to(values_NhPd.dtype)
        return cls(model, contexts, layers, logits_NV)

    def rows(self) -> _SharedRows:
        shared = SharedContexts(self._layers, self._contexts.input_ids_NX.shape[1], self._contexts.lengths_N)
        return _SharedRows(self._model, shared)


def _buffer(states_nhwd: Tensor, N: int, S: int) -> Tensor:
    device, dtype = states_nhwd.device.type, states_nhwd.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)  # every product would convert them
    # Zeros, because a weight of zero would turn NaN behind a short context into NaN.
    return states_nhwd.new_zeros(N, states_nhwd.shape[1], S + _ROOM, states_nhwd.shape[3], dtype=dtype)


class _SharedRows:
    """Keys and values are stored once per context."""

    def __init__(self, model: Any, shared: SharedContexts) -> None:
        self._model, self._shared = model, shared

    def select(self, contexts_n: Tensor) -> None:
        self._shared.select(contexts_n)

    def step(self, tokens_NW: Tensor, parents_NW: Tensor) -> Tensor:
        cache, positions_R1 = self._shared.branch(parents_NW)
        with self._shared.attached(self._model):
            logits_R1V = self._model(
                input_ids=tokens_NW.reshape(-1, 1), position_ids=positions_R1, past_key_values=cache, use_cache=True
            ).logits
        return logits_R1V[:, -1].unflatten(0, tokens_NW.shape)


# --- Keys, values and states copied for every hypothesis


class _CopiedStart:
    """Caches of contexts of equal length."""

    def __init__(self, model: Any, contexts: Rows) -> None:
        if "past_key_values" not in inspect.signature(model.forward).parameters:
            raise ConfigError(
                f"The generator ({type(model).__name__}) keeps its state in a cache of its own, which hypotheses "
                "cannot branch from. Call the decoder with use_cache=False, or choose another generator."
            )
        self._model, self._caches = model, []
        by_length: dict[int, list[int]] = {}
        for row, length in enumerate(contexts.lengths_N.tolist()):
            by_length.setdefault(length, []).append(row)
        logits, order = [], []
        for length, group in by_length.items():
            rows_n = torch.tensor(group, device=contexts.lengths_N.device)
            cache = DynamicCache(config=model.config)
            ids_nw, lengths_n = contexts.input_ids_NX[rows_n, :length], contexts.lengths_N[rows_n]
            logits.append(_last_logits(model, ids_nw, lengths_n, past_key_values=cache, use_cache=True))
            order += group
            self._caches.append((rows_n, cache))
        self.first_logits_NV = torch.cat(logits)[torch.tensor(order, device=contexts.lengths_N.device).argsort()]

    def rows(self) -> _CopiedRows:
        return _CopiedRows(self._model, [(rows_n, copy.deepcopy(cache)) for rows_n, cache in self._caches])


class _CopiedRows:
    """A cache for each group of contexts, one row per hypothesis, copied when hypotheses are re-ordered."""

    def __init__(self, model: Any, caches: list[tuple[Tensor, Any]]) -> None:
        self._model, self._caches, self._width = model, caches, 1

    def select(self, contexts_n: Tensor) -> None:
        kept = []
        for rows_n, cache in self._caches:
            places_n, inside_n = torch.nonzero(contexts_n.unsqueeze(1) == rows_n, as_tuple=True)
            if len(places_n):
                cache.reorder_cache(_hypotheses_of(inside_n, self._width).flatten())
                kept.append((places_n, cache))
        self._caches = kept

    def step(self, tokens_NW: Tensor, parents_NW: Tensor) -> Tensor:
        logits, places = [], []
        for rows_n, cache in self._caches:
            firsts_n1 = torch.arange(len(rows_n), device=rows_n.device).unsqueeze(1) * self._width
            cache.reorder_cache((firsts_n1 + parents_NW[rows_n]).flatten())
            tokens_R1 = tokens_NW[rows_n].reshape(-1, 1)
            logits_R1V = self._model(input_ids=tokens_R1, past_key_values=cache, use_cache=True).logits
            logits.append(logits_R1V[:, -1].unflatten(0, (len(rows_n), -1)))
            places.append(rows_n)
        self._width = parents_NW.shape[1]
        return torch.cat(logits)[torch.cat(places).argsort()]


def _hypotheses_of(contexts_n: Tensor, W: int) -> Tensor:
    return contexts_n.unsqueeze(1) * W + torch.arange(W, device=contexts_n.device)


# --- Nothing stored


class _UncachedStart:
    """Every step reads contexts and answers again."""

    def __init__(self, model: Any, contexts: Rows) -> None:
        self._model, self._contexts = model, contexts
        self.first_logits_NV = _read_again(model, contexts.input_ids_NX, contexts.lengths_N)

    def rows(self) -> _UncachedRows:
        return _UncachedRows(self._model, self._contexts)


class _UncachedRows:
    """Keys and values are not stored."""

    def __init__(self, model: Any, contexts: Rows) -> None:
        self._model, self._ids_NS, self._lengths_N = model, contexts.input_ids_NX, contexts.lengths_N
        self._answers_NWT = contexts.input_ids_NX.new_zeros(len(contexts.input_ids_NX), 1, 0)

    def select(self, contexts_n: Tensor) -> None:
        self._ids_NS, self._lengths_N = self._ids_NS[contexts_n], self._lengths_N[contexts_n]
        self._answers_NWT = self._answers_NWT[contexts_n]

    def step(self, tokens_NW: Tensor, parents_NW: Tensor) -> Tensor:
        N, W = parents_NW.shape
        past_NWT = self._answers_NWT.gather(1, parents_NW.unsqueeze(2).expand(-1, -1, self._answers_NWT.shape[2]))
        self._answers_NWT = torch.cat((past_NWT, tokens_NW.unsqueeze(2)), dim=2)
        T = self._answers_NWT.shape[2]
        ids_RX = torch.nn.functional.pad(self._ids_NS.repeat_interleave(W, dim=0), (0, T))
        lengths_R = self._lengths_N.repeat_interleave(W)
        places_RT = lengths_R.unsqueeze(1) + torch.arange(T, device=lengths_R.device)
        ids_RX = ids_RX.scatter(1, places_RT, self._answers_NWT.flatten(0, 1))
        return _read_again(self._model, ids_RX, lengths_R + T).unflatten(0, (N, W))


def _read_again(model: Any, input_ids_RX: Tensor, lengths_R: Tensor) -> Tensor:
    """Logits (R, V) at the last token of rows that are padded behind it."""
    return _last_logits(model, input_ids_RX, lengths_R, use_cache=False)
