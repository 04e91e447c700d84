"""Answers have the spelling of the passages, although the generator's tokenizer loses it."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, BertTokenizer, PreTrainedTokenizerFast

from rag_core.model.surface import PROBE, SurfaceReader
from rag_core.pretrained.model_source import resolve_model_source
from tests.conftest import MINILM


@pytest.fixture(scope="module")
def uncased() -> BertTokenizer:
    return AutoTokenizer.from_pretrained(resolve_model_source(MINILM))


def _bytes_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE without merges: decoding loses nothing."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={letter: at for at, letter in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, clean_up_tokenization_spaces=False)


def _ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    ("answer", "passage"),
    [
        ("America/New_York", "Its time zone is America/New_York, five hours behind."),
        ("1,000", "About 1,000 people live there."),
        ("São Tomé", "The capital is São Tomé."),
        ("Zürich", "Zürich"),
        ("O'Brien & Sons (Ltd.)", "It belongs to O'Brien & Sons (Ltd.), a firm."),
        ("3.14", "Pi is 3.14 or so."),
    ],
)
def test_an_answer_comes_back_as_the_passage_spells_it(uncased: BertTokenizer, answer: str, passage: str) -> None:
    ids = _ids(uncased, answer)
    assert uncased.decode(ids) != answer
    assert SurfaceReader(uncased)(ids, ["Nothing of the kind.", passage]) == answer


def test_the_most_probable_passage_decides_on_the_spelling(uncased: BertTokenizer) -> None:
    read = SurfaceReader(uncased)
    assert read(_ids(uncased, "new york"), ["NEW YORK", "New York"]) == "NEW YORK"
    assert read(_ids(uncased, "new york"), ["New York", "NEW YORK"]) == "New York"


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("America/New_York", "america/new_york"),
        ("1,000", "1,000"),
        ("3.14", "3.14"),
        ("Jean-Luc", "jean-luc"),
        ("Paris, France", "paris, france"),
    ],
)
def test_without_a_passage_that_holds_it_gaps_are_closed(uncased: BertTokenizer, answer: str, text: str) -> None:
    for passages in ([], ["Another text altogether."]):
        assert SurfaceReader(uncased)(_ids(uncased, answer), passages) == text


def test_tokens_that_stand_apart_in_a_passage_are_not_joined(uncased: BertTokenizer) -> None:
    assert SurfaceReader(uncased)(_ids(uncased, "new york"), ["New towns near York"]) == "new york"


def test_an_empty_answer_is_an_empty_text(uncased: BertTokenizer) -> None:
    assert SurfaceReader(uncased)([], ["Lyon"]) == ""


def test_a_lossless_tokenizer_is_simply_decoded() -> None:
    tokenizer = _bytes_tokenizer()
    read = SurfaceReader(tokenizer)
    for text in (PROBE, "Lyon - 1 , 000 / x", "é è"):
        assert read(_ids(tokenizer, text), [text.upper(), "Lyon"]) == text
