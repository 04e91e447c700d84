"""Whether a DPR tokenizer lower-cases its text: as its files say, which Transformers 5 does not ask.

Transformers' DPR tokenizers take `do_lower_case` and keep it to themselves: all of them lower-case. That is right for the
released models, and wrong for one trained on a cased BERT, such as the multilingual one. `tokenizer.json` is the truth
where there is one (saved by Transformers 5, `tokenizer_config.json` says false for uncased ones, too); else
`tokenizer_config.json` is; where neither says anything, text is lower-cased.
"""

from __future__ import annotations

from typing import Any

from tokenizers.normalizers import BertNormalizer

from rag_core.pretrained.model_source import read_json


def with_saved_case(tokenizer: Any, source: str, subfolder: str = "") -> Any:
    """The tokenizer of `source`; if it is DPR's and its files say that text keeps its case, it does."""
    if not type(tokenizer).__name__.startswith("DPR"):
        return tokenizer
    saved = _bert_normalizer((_read(source, subfolder, "tokenizer.json")).get("normalizer"))
    config = _read(source, subfolder, "tokenizer_config.json")
    lowercase = saved.get("lowercase", config.get("do_lower_case", True))
    if lowercase is False:
        tokenizer.backend_tokenizer.normalizer = BertNormalizer(
            clean_text=saved.get("clean_text", True),
            handle_chinese_chars=saved.get("handle_chinese_chars", config.get("tokenize_chinese_chars", True)),
            strip_accents=saved.get("strip_accents", config.get("strip_accents")),
            lowercase=False,
        )
    return tokenizer


def _bert_normalizer(saved: Any) -> dict[str, Any]:
    """The settings of BERT's normalizer, alone or in a sequence; empty if there is none."""
    if not isinstance(saved, dict):
        return {}
    parts = saved.get("normalizers", [saved])
    return next((one for one in parts if isinstance(one, dict) and one.get("type") == "BertNormalizer"), {})


def _read(source: str, subfolder: str, name: str) -> dict[str, Any]:
    content = read_json(source, f"{subfolder}/{name}".lstrip("/"))
    return content if isinstance(content, dict) else {}
