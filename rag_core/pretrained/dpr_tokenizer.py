"""Make a DPR tokenizer keep the case of its text if its files say so.

Transformers 5's DPR tokenizers accept `do_lower_case` but ignore it: they always lower-case. That is right for the
released models, and wrong for a model trained on a cased BERT, such as the multilingual one. If there is a
`tokenizer.json`, it decides, because a `tokenizer_config.json` saved by Transformers 5 says false for uncased models,
too. Otherwise `tokenizer_config.json` decides. If neither says anything, text is lower-cased.
"""

from __future__ import annotations

from typing import Any

from tokenizers.normalizers import BertNormalizer

from rag_core.pretrained.model_source import read_json


def with_saved_case(tokenizer: Any, source: str, subfolder: str = "") -> Any:
    """Return `tokenizer`; if it is DPR's and the files of `source` say so, make it keep the case of its text."""
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


def _bert_normalizer(normalizer: Any) -> dict[str, Any]:
    """The settings of BERT's normalizer, which stands alone or in a sequence; empty if there is none."""
    if not isinstance(normalizer, dict):
        return {}
    parts = normalizer.get("normalizers", [normalizer])
    return next((part for part in parts if isinstance(part, dict) and part.get("type") == "BertNormalizer"), {})


def _read(source: str, subfolder: str, name: str) -> dict[str, Any]:
    content = read_json(source, f"{subfolder}/{name}".lstrip("/"))
    return content if isinstance(content, dict) else {}
