"""Metric names for MLflow: encode any question type in a name that every store accepts, and decode it.

MLflow accepts letters, digits and `_ - . / : space`, at most 250 characters, and no odd paths (`..`, `a//b`). Some of
its stores do not distinguish `A` from `a`. A type's scores are named `TYPE/em`, so the prefix itself must have no
slash; scores of all questions have no prefix.

A character that MLflow refuses is written `:HEX:`, its code point. If types differ only by case or accents, all their
letters except a to z are written so. A very long type is cut, and ends in `:-` and a hash of the whole.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable

from rag_core.evaluation.scores import Evaluation

# MLflow's limit for a name is 250; the score's own name comes after the prefix.
MOST_CHARACTERS = 180
_ESCAPE = re.compile(":([0-9a-f]+):")
# Dots that could begin a path, and spaces at the ends, which some stores ignore.
_ENDS = re.compile(r"^[. ]+| +$")
_ODD = re.compile(r"[^\w.\- ]")
_ODD_OR_VARYING = re.compile(r"[^a-z0-9_.\- ]")


def metric_name(name: str) -> str:
    """A score's name without @, which MLflow refuses: recall@5 becomes recall_at_5."""
    return name.replace("@", "_at_")


def metric_prefixes(types: Iterable[str]) -> dict[str, str]:
    """The prefix of each type's metric names. Prefixes stay distinct in a store that ignores case and accents."""
    types = list(types)
    alike = Counter(map(_folded, types))
    return {name: _shortened(_escaped(name, strict=alike[_folded(name)] > 1)) for name in types}


def type_of_prefix(prefix: str) -> str | None:
    """The type that a prefix stands for; None if the type was too long and cut (`scores.json` has it whole)."""
    if ":" in _ESCAPE.sub("", prefix):
        return None
    return _ESCAPE.sub(lambda match: chr(int(match.group(1), 16)), prefix)


def score_metrics(evaluation: Evaluation) -> dict[str, float]:
    """Every score by its metric name.

    `count` is the number of questions scored, `unanswerable` the number left out (for a type only if there are any).
    `em_count` exists only if that mean is over fewer questions than `count`.
    """
    groups = {"": evaluation.overall}
    prefixes = metric_prefixes(evaluation.by_type)
    groups |= {f"{prefixes[name]}/": scores for name, scores in evaluation.by_type.items()}
    metrics: dict[str, float] = {}
    for prefix, scores in groups.items():
        metrics |= {f"{prefix}{metric_name(name)}": value for name, value in scores.means.items()}
        metrics[f"{prefix}count"] = float(scores.count)
        if scores.unanswerable or not prefix:
            metrics[f"{prefix}unanswerable"] = float(scores.unanswerable)
        fewer = {name: count for name, count in scores.counts.items() if count != scores.count}
        metrics |= {f"{prefix}{metric_name(name)}_count": float(count) for name, count in fewer.items()}
    return metrics


def _escaped(name: str, strict: bool) -> str:
    odd = _ODD_OR_VARYING if strict else _ODD
    text = odd.sub(lambda match: f":{ord(match.group()):x}:", name)
    return _ENDS.sub(lambda match: "".join(f":{ord(letter):x}:" for letter in match.group()), text)


def _shortened(text: str) -> str:
    if len(text) <= MOST_CHARACTERS:
        return text
    begin = re.sub(":[0-9a-f]*$", "", text[: MOST_CHARACTERS - 20])
    return f"{begin}:-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _folded(name: str) -> str:
    decomposed = unicodedata.normalize("NFKD", name.casefold())
    return "".join(letter for letter in decomposed if not unicodedata.combining(letter)).strip()
