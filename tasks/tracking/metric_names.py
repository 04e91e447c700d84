"""Metric names for MLflow: any question type in a name that every store takes, and back.

MLflow takes letters, digits and `_ - . / : space`, names of at most 250 characters that are no odd paths (`..`,
`a//b`), and some of its stores do not tell `A` from `a`. A type's scores are named `TYPE/em`, so that its prefix must
have no slash; scores of all questions have no slash. What MLflow does not take is written `:HEX:`, the character's
code point. Of types that differ only by case or accents, every letter but a to z is written so;
of a very long one the beginning is kept, with `:-` and a hash of the whole.
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
# Dots that could begin a path; spaces at the ends, which some stores do not tell from none.
_ENDS = re.compile(r"^[. ]+| +$")
_ODD = re.compile(r"[^\w.\- ]")
_ODD_OR_VARYING = re.compile(r"[^a-z0-9_.\- ]")


def metric_name(name: str) -> str:
    """MLflow refuses @ in names: recall@5 becomes recall_at_5."""
    return name.replace("@", "_at_")


def metric_prefixes(types: Iterable[str]) -> dict[str, str]:
    """For each type the beginning of its metrics' names; distinct even where case and accents do not count."""
    types = list(types)
    alike = Counter(map(_folded, types))
    return {name: _shortened(_escaped(name, strict=alike[_folded(name)] > 1)) for name in types}


def type_of_prefix(prefix: str) -> str | None:
    """The type that a prefix stands for; None if it was too long to be written out (`scores.json` has it)."""
    if ":" in _ESCAPE.sub("", prefix):
        return None
    return _ESCAPE.sub(lambda found: chr(int(found.group(1), 16)), prefix)


def score_metrics(evaluation: Evaluation) -> dict[str, float]:
    """Every score by its metric's name.

    `count` is the number of questions, `unanswerable` that of those left out (where there are any), and `em_count` is
    there where a mean is over fewer questions than `count`.
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
    text = odd.sub(lambda found: f":{ord(found.group()):x}:", name)
    return _ENDS.sub(lambda found: "".join(f":{ord(one):x}:" for one in found.group()), text)


def _shortened(text: str) -> str:
    if len(text) <= MOST_CHARACTERS:
        return text
    begin = re.sub(":[0-9a-f]*$", "", text[: MOST_CHARACTERS - 20])
    return f"{begin}:-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _folded(name: str) -> str:
    decomposed = unicodedata.normalize("NFKD", name.casefold())
    return "".join(one for one in decomposed if not unicodedata.combining(one)).strip()
