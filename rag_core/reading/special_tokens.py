"""Special tokens inside titles, passages, questions and answers stay text.

A tokenizer turns the text of a special token (`<|im_end|>`, `</s>`, `[SEP]`) into that token wherever it stands. Inside
a passage it would end the user's turn, and what follows it would speak as the system: anybody who can write a passage
could give orders to the generator. So such text gets a space after its first character (`< |im_end|>`), which the
generator reads as nearly the same. Texts without special tokens keep their ids.

Tokens are recognised by id, not by spelling: normalisation (full-width brackets, upper case) cannot hide them, nor can
one that a field and the template write together. Slow tokenizers report no places, so spelling decides there.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any

from rag_core.errors import ConfigError
from rag_core.reading.prompt import Filled

# Rounds in which spaces break a token, before its characters are dropped: a normaliser may remove spaces again.
_ROUNDS_OF_SPACES = 4

Encode = Callable[[str], Any]


class SpecialTokens:
    """The tokens of a tokenizer that no field may write, and the way to break them.

    These are its special tokens but "unknown", and the other added tokens that its chat template writes, such as
    `<think>`. Added tokens that stand for ordinary text (white space, HTML tags) are not among them.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._fast = bool(tokenizer.is_fast)
        template, listed = _chat_template_text(tokenizer), getattr(tokenizer, "chat_control_tokens", None) or ()
        self._spelling: dict[int, str] = {}
        for token, added in tokenizer.added_tokens_decoder.items():
            written = _is_bracketed(added.content) and added.content in template
            if added.special or written or added.content in listed:
                self._spelling[token] = added.content
        for token, text in zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True):
            self._spelling.setdefault(token, text)
        self._unknown = tokenizer.unk_token_id
        others = [value for name, value in tokenizer.special_tokens_map.items() if name != "unk_token"]
        if self._unknown is not None and tokenizer.unk_token not in others:
            self._spelling.pop(self._unknown, None)
        self._spelling = {token: text for token, text in self._spelling.items() if text.strip()}
        longest_first = sorted(self._spelling.values(), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def count(self, ids: Sequence[int]) -> int:
        """How many of the ids are such tokens."""
        return sum(map(self._spelling.__contains__, ids))

    def broken(self, filled: Filled, encode: Encode) -> Filled:
        """Return the filled template with such tokens in its fields broken.

        Args:
            filled: title, text and question (or an answer) in a template. What the template itself writes is kept.
            encode: encodes a text as the generator will read it, with `offset_mapping` if the tokenizer is fast.
        """
        for attempt in itertools.count():
            places = self._places(filled, encode)
            if not places:
                return filled
            spaces: list[int] = []
            blanks: list[int] = []
            for first, last in places:
                own = filled.in_fields(first, last)
                start = last - len(filled.text[first:last].lstrip())
                if attempt < _ROUNDS_OF_SPACES and len(filled.text[first:last].strip()) > 1:
                    spaces.append(max(start + 1, own[0]))
                else:
                    blanks += own
            filled = filled.blanked(blanks).with_spaces_at(spaces)
        raise AssertionError("unreachable: blanking leaves fewer characters each time")

    def _places(self, filled: Filled, encode: Encode) -> list[tuple[int, int]]:
        """Where such tokens stand that a field has a part in, in order."""
        if self._fast:
            encoded = encode(filled.text)
            pairs = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
            places = [place for token, place in pairs if self._is_written(token, filled.text[slice(*place)])]
        else:
            places = [match.span() for match in self._pattern.finditer(filled.text)]
        return [place for place in places if filled.in_fields(*place)]

    def _is_written(self, token: int, text: str) -> bool:
        # A tokenizer whose "unknown" is its end token, too, gives it for unknown characters: these stay.
        return token in self._spelling and (token != self._unknown or self._spelling[token] in text)


def end_token_id(tokenizer: Any) -> int:
    """The token that ends an answer: the tokenizer's EOS, or SEP for BERT-like tokenizers."""
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    if end is None:
        raise ConfigError("The generator's tokenizer has neither an EOS nor a SEP token, so answers could never end.")
    return int(end)


def _chat_template_text(tokenizer: Any) -> str:
    template = getattr(tokenizer, "chat_template", None) or ""
    return template if isinstance(template, str) else "\n".join(template.values())


def _is_bracketed(text: str) -> bool:
    return len(text) > 1 and not (text[0].isalnum() or text[-1].isalnum() or text.isspace())
