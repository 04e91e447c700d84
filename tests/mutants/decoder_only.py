"""Faults in decoder-only generators: layout, shared attention, steps."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

FAMILIES = "tests/decoding/test_decoder_only_families.py"
LAYOUT = "rag_core/generators/decoder_only/layout.py"
GENERATOR = "rag_core/generators/decoder_only/generator.py"
STEPS = "rag_core/generators/decoder_only/passage_decoder.py"
SHARED = "rag_core/generators/decoder_only/shared_attention.py"

DECODER_ONLY = (
    Mutant(
        "the last prompt token's logit forgotten",
        LAYOUT,
        "places_NT = starts_N1 - 1 + torch.arange",
        "places_NT = starts_N1 + torch.arange",
        FAMILIES,
    ),
    Mutant(
        "padding on the left not moved",
        LAYOUT,
        "padding_NS.to(torch.uint8).argsort(dim=1, stable=True)",
        "torch.arange(padding_NS.shape[1]).expand_as(padding_NS)",
        FAMILIES,
    ),
    Mutant(
        "answers one token behind their contexts",
        LAYOUT,
        "ids_NX.scatter(1, places_NT[:, 1:],",
        "ids_NX.scatter(1, places_NT[:, :-1],",
        FAMILIES,
    ),
    Mutant(
        "answers given to other contexts",
        GENERATOR,
        "return grouped_NT[order_N.argsort()], dtype",
        "return grouped_NT[order_N], dtype",
        FAMILIES,
    ),
    Mutant(
        "a position off by one",
        SHARED,
        "positions_NW = self.next_N.unsqueeze(1)",
        "positions_NW = (self.next_N + 1).unsqueeze(1)",
        FAMILIES,
    ),
    Mutant(
        "positions do not go on",
        SHARED,
        "self.next_N = self.next_N + 1",
        "self.next_N = self.next_N + 0",
        FAMILIES,
    ),
    Mutant(
        "the contexts' padding attended to",
        SHARED,
        "(places_S < lengths_N.unsqueeze(1)).unsqueeze(1)",
        "(places_S < S).expand(len(lengths_N), 1, -1)",
        FAMILIES,
    ),
    Mutant(
        "keys of another group",
        SHARED,
        "query.reshape(N, W, h, g, d).transpose(1, 2)",
        "query.reshape(N, W, g, h, d).transpose(2, 3).transpose(1, 2)",
        FAMILIES,
    ),
    Mutant("the window ignored", SHARED, "if window is not None:", "if False:", FAMILIES),
    Mutant("the window a token too wide", SHARED, "- 1 - window", "- 2 - window", FAMILIES),
    Mutant("soft-capped scores not capped", SHARED, "if softcap is not None:", "if False:", FAMILIES),
    Mutant(
        "attention sinks ignored",
        SHARED,
        'raise NotShareableError(", ".join(unknown) or "its mask")',
        "pass",
        FAMILIES,
    ),
    Mutant(
        "finished contexts stay, and others are dropped, in copied caches",
        STEPS,
        "_hypotheses_of(inside_n, self._width)",
        "_hypotheses_of(inside_n * 0, self._width)",
        FAMILIES,
    ),
    Mutant(
        "contexts of unequal length share a copied cache",
        STEPS,
        "by_length.setdefault(length, [])",
        "by_length.setdefault(max(contexts.lengths_N.tolist()), [])",
        FAMILIES,
    ),
    Mutant(
        "without a cache the answer is read before the context ends",
        STEPS,
        "places_RT = lengths_R.unsqueeze(1)",
        "places_RT = lengths_R.unsqueeze(1) - 1",
        FAMILIES,
    ),
)
