"""Questions and passages joined: what is kept, what is cut, and what the generator is asked to write."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rag_core.contexts import PromptConfig, answer_labels, assemble_contexts, end_token_id
from rag_core.errors import ConfigError
from rag_core.model_source import resolve_model_source
from rag_core.passages import Passage
from tests.conftest import MINILM

CPU = torch.device("cpu")
QUESTIONS = ["which country is Lyon in?", "what water flows through Oslo, please?"]
PASSAGES = [
    [Passage("1", "Lyon", "Lyon is a city in France."), Passage("2", "", "The Rhone flows through it, and the Saone.")],
    [Passage("3", "Oslo", "Short."), Passage("4", "Cork", "About 224,000 people live in Cork.")],
]
LONG = Passage("5", "Lyon", " ".join(f"fact {number} of Lyon;" for number in range(80)))


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(resolve_model_source(MINILM))


def _word_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """Words to ids, no special tokens added: <s> 0, </s> 1, <pad> 2."""
    words = ["<s>", "</s>", "<pad>", "<unk>", "France", "Rhone"]
    inner = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", pad_token="<pad>", **special)


@pytest.mark.parametrize(
    "template",
    ["{title} {text}", "{title} {question}", "{text} {text} {question}", "{text} {question} {question}", "", "text"],
)
def test_a_template_without_text_and_question_once_each_is_refused(template: str) -> None:
    with pytest.raises(ValidationError, match=r"must hold \{text\} and \{question\}"):
        PromptConfig(template=template)
    with pytest.raises(ValidationError, match="at most once"):
        PromptConfig(template="{title}{title}{text}{question}")


@pytest.mark.parametrize(
    "template",
    [
        "{title} / {text} // {question}",
        "question: {question} context: {title} {text}",
        "{text}{question}",
        "{question} {text} {title}",
    ],
)
def test_contexts_are_the_tokens_of_the_filled_template(tokenizer, template: str) -> None:
    prompt = PromptConfig(template=template)
    ids_BKS, mask_BKS = assemble_contexts(tokenizer, prompt, QUESTIONS, PASSAGES, CPU)
    assert ids_BKS.dtype == mask_BKS.dtype == torch.int64
    assert ids_BKS.shape == mask_BKS.shape
    longest = 0
    for b, question in enumerate(QUESTIONS):
        for k, passage in enumerate(PASSAGES[b]):
            filled = template.format(title=passage.title, text=passage.text, question=question)
            expected = tokenizer(filled)["input_ids"]
            longest = max(longest, len(expected))
            assert mask_BKS[b, k].tolist() == [1] * len(expected) + [0] * (ids_BKS.shape[2] - len(expected))
            assert ids_BKS[b, k][: len(expected)].tolist() == expected
            assert (ids_BKS[b, k][len(expected) :] == tokenizer.pad_token_id).all()
    assert ids_BKS.shape == (2, 2, longest)


@pytest.mark.parametrize("template", ["{title} / {text} // {question}", "{question} | {text}"])
def test_a_long_passage_is_cut_at_its_end_and_the_question_stays_whole(tokenizer, template: str) -> None:
    prompt = PromptConfig(template=template, max_context_tokens=40)
    ids_BKS, mask_BKS = assemble_contexts(tokenizer, prompt, QUESTIONS[:1], [[LONG, PASSAGES[0][0]]], CPU)
    assert ids_BKS.shape == (1, 2, 40)
    assert mask_BKS[0, 0].sum() == 40
    before, after = template.split("{text}")
    fill = {"title": LONG.title, "question": QUESTIONS[0]}
    head = tokenizer(before.format(**fill), add_special_tokens=False)["input_ids"]
    tail = tokenizer(after.format(**fill), add_special_tokens=False)["input_ids"]
    text = tokenizer(LONG.text, add_special_tokens=False)["input_ids"]
    room = 40 - 2 - len(head) - len(tail)
    assert 0 < room < len(text)
    expected = [tokenizer.cls_token_id, *head, *text[:room], *tail, tokenizer.sep_token_id]
    assert ids_BKS[0, 0].tolist() == expected


def test_a_question_that_takes_all_the_room_drops_the_passage_and_one_token_more_is_refused(tokenizer) -> None:
    prompt = PromptConfig(template="{text} {question}", max_context_tokens=8)
    ids_BKS, _ = assemble_contexts(tokenizer, prompt, ["one two three four five six"], [[LONG]], CPU)
    assert tokenizer.decode(ids_BKS[0, 0]) == "[CLS] one two three four five six [SEP]"
    with pytest.raises(ConfigError, match=r"takes 9 tokens, but max_context_tokens is 8"):
        assemble_contexts(tokenizer, prompt, ["one two three four five six seven"], [[LONG]], CPU)


def test_a_question_that_does_not_fit_is_refused_even_beside_a_short_passage(tokenizer) -> None:
    prompt = PromptConfig(template="{text} {question}", max_context_tokens=8)
    with pytest.raises(ConfigError, match="Shorten the question"):
        assemble_contexts(tokenizer, prompt, ["word " * 30], [[Passage("1", "", "short")]], CPU)


def test_braces_inside_fields_stay_as_they_are(tokenizer) -> None:
    prompt = PromptConfig(template="{title} / {text} // {question}")
    passage = Passage("1", "a {question} {text} {0}", "set {x} {title} {question} }{ \\1 \\g<0>")
    ids_BKS, _ = assemble_contexts(tokenizer, prompt, ["what is {title} {text} \\1?"], [[passage]], CPU)
    wanted = "a {question} {text} {0} / set {x} {title} {question} }{ \\1 \\g<0> // what is {title} {text} \\1?"
    assert ids_BKS[0, 0].tolist() == tokenizer(wanted)["input_ids"]


def test_labels_are_answer_tokens_and_end_without_start_padded_with_minus_100(tokenizer) -> None:
    labels_BT = answer_labels(tokenizer, ["France", "522,000"], 8, CPU)
    france = tokenizer.convert_tokens_to_ids("france")
    number = tokenizer.convert_tokens_to_ids(tokenizer.tokenize("522,000"))
    end = tokenizer.sep_token_id
    assert labels_BT.dtype == torch.int64
    assert labels_BT.tolist() == [[france, end] + [-100] * (len(number) - 1), [*number, end]]
    assert tokenizer.cls_token_id not in labels_BT


def test_a_long_answer_is_cut_and_still_ends(tokenizer) -> None:
    labels_BT = answer_labels(tokenizer, ["one two three four five six"], 4, CPU)
    assert labels_BT.tolist() == [[*tokenizer.convert_tokens_to_ids(["one", "two", "three"]), tokenizer.sep_token_id]]


def test_the_end_token_is_eos_before_sep_and_a_tokenizer_without_either_is_refused(tokenizer) -> None:
    assert end_token_id(tokenizer) == tokenizer.sep_token_id
    both = _word_tokenizer(eos_token="</s>", sep_token="<s>")
    assert answer_labels(both, ["France Rhone"], 8, CPU).tolist() == [[4, 5, 1]]
    with pytest.raises(ConfigError, match="neither an EOS nor a SEP"):
        answer_labels(_word_tokenizer(), ["France"], 8, CPU)
