"""Contexts made of questions and passages: what is kept, what is cut, and the labels of answers."""

from __future__ import annotations

import json
from typing import Any

import pytest
import sentencepiece
import torch
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import MarianTokenizer, PreTrainedTokenizerFast

from rag_core.corpus.passages import Passage
from rag_core.errors import ConfigError
from rag_core.model.surface import SurfaceReader
from rag_core.reading.contexts import ContextCount, answer_labels, assemble_contexts, end_token_id
from rag_core.reading.prompt import CHAT, TEMPLATES, PromptConfig

CPU = torch.device("cpu")
QUESTIONS = ["which country is Lyon in?", "what water flows through Oslo, please?"]
PASSAGES = [
    [Passage("1", "Lyon", "Lyon is a city in France."), Passage("2", "", "The Rhone flows through it, and the Saone.")],
    [Passage("3", "Oslo", "Short."), Passage("4", "Cork", "About 224,000 people live in Cork.")],
]
LONG = Passage("5", "Lyon", " ".join(f"fact {number} of Lyon;" for number in range(80)))


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


def test_a_named_template_is_kept_written_out_and_the_papers_is_the_default() -> None:
    assert PromptConfig().template == PromptConfig(template="bart").template == "{title} / {text} // {question}"
    from_yaml = PromptConfig.model_validate(yaml.safe_load("prompt: {template: t5}")["prompt"])
    assert json.loads(from_yaml.model_dump_json())["template"] == "question: {question} context: {title} {text}"
    assert PromptConfig.model_validate_json(from_yaml.model_dump_json()) == from_yaml
    with pytest.raises(ValidationError, match="one of the names bart, t5, plain, chat"):
        PromptConfig(template="T5")
    described = PromptConfig.model_fields["template"].description or ""
    assert all(name in described for name in (*TEMPLATES, CHAT, *map(repr, TEMPLATES.values())))


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
    contexts = assemble_contexts(tokenizer, prompt, QUESTIONS, PASSAGES, CPU)
    ids_BKS, mask_BKS = contexts.input_ids_BKS, contexts.attention_mask_BKS
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
    contexts = assemble_contexts(tokenizer, prompt, QUESTIONS[:1], [[LONG, PASSAGES[0][0]]], CPU)
    ids_BKS, mask_BKS = contexts.input_ids_BKS, contexts.attention_mask_BKS
    assert contexts.cut == 1
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
    ids_BKS = assemble_contexts(tokenizer, prompt, ["one two three four five six"], [[LONG]], CPU).input_ids_BKS
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
    ids_BKS = assemble_contexts(tokenizer, prompt, ["what is {title} {text} \\1?"], [[passage]], CPU).input_ids_BKS
    filled = "a {question} {text} {0} / set {x} {title} {question} }{ \\1 \\g<0> // what is {title} {text} \\1?"
    assert ids_BKS[0, 0].tolist() == tokenizer(filled)["input_ids"]


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


@pytest.mark.parametrize("family", ["tokenizer", "bart", "t5"])
def test_answers_are_the_same_tokens_as_target_where_a_tokenizer_has_one_side(
    family: str, request: pytest.FixtureRequest
) -> None:
    one_side = request.getfixturevalue(family)
    answers = ["France", "the river Rhone", "522,000", " Zürich ", ""]
    for answer, labels in zip(answers, answer_labels(one_side, answers, 64, CPU).tolist(), strict=True):
        expected = one_side(answer, add_special_tokens=False)["input_ids"]
        assert [label for label in labels if label != -100] == [*expected, end_token_id(one_side)]


def test_a_tokenizer_with_two_sides_writes_with_the_targets_pieces(marian: MarianTokenizer) -> None:
    target = sentencepiece.SentencePieceProcessor(model_file=marian.spm_files[1])
    pieces = target.encode("Norwegen", out_type=str)
    assert pieces != marian.tokenize("Norwegen"), "both sides cut the word alike, so this test would show nothing"
    expected = [*(marian.encoder[piece] for piece in pieces), marian.eos_token_id]
    assert answer_labels(marian, ["Norwegen"], 32, CPU).tolist() == [expected]
    # The side that reads is unchanged.
    context = assemble_contexts(marian, PromptConfig(), QUESTIONS[:1], [PASSAGES[0][:1]], CPU).input_ids_BKS[0, 0]
    assert context.tolist() == marian(f"Lyon / {PASSAGES[0][0].text} // {QUESTIONS[0]}")["input_ids"]


def test_answers_of_a_slow_tokenizer_are_decoded_without_offsets(marian: MarianTokenizer) -> None:
    (labels,) = answer_labels(marian, ["Norwegen"], 32, CPU).tolist()
    assert SurfaceReader(marian)(labels[:-1], ["Oslo liegt in Norwegen."]) == "Norwegen"


def test_counts_subtract_and_their_share_lies_between_zero_and_one() -> None:
    assert ContextCount(10, 4) - ContextCount(2, 3) == ContextCount(8, 1)
    assert [ContextCount(8, cut).cut_share for cut in (0, 2, 8)] == [0, 0.25, 1]
    assert ContextCount().cut_share == 0


WORDS = [
    "Lyon",
    "river",
    "naïve",
    "e\u0301",
    "👩‍👧",
    "🇫🇷",
    "東京",
    "  ",
    "< /s>",
    "//",
    "ﬁ",
    "{text}",
    "\u2028",
]
ANY_TEXT = st.one_of(st.sampled_from(WORDS), st.text(max_size=5))
ORDERS = [
    TEMPLATES["bart"],
    TEMPLATES["t5"],
    "{text}{question}",
    "{question}{text}",
    "{question} {text} {title}",
    "{title} {question}: {text} end",
]
CASES = {
    "title": st.lists(ANY_TEXT, max_size=2).map(" ".join),
    "text": st.lists(ANY_TEXT, max_size=30).map(" ".join),
    "question": st.lists(ANY_TEXT, max_size=4).map(" ".join),
    "room": st.integers(10, 60),
}
SPACES = {"title": "", "text": " " * 90, "question": "what is it?", "room": 16}
EMOJI = {"title": "", "text": "👩‍👧" * 20, "question": "🇫🇷?", "room": 16}


def _assembled(tokenizer: Any, template: str, case: dict[str, Any]) -> tuple[list[int], int] | None:
    """The ids of one context and the number of cut contexts, or None if the question does not fit."""
    prompt = PromptConfig(template=template, max_context_tokens=case["room"])
    try:
        passages = [[Passage("1", case["title"], case["text"])]]
        result = assemble_contexts(tokenizer, prompt, [case["question"]], passages, CPU)
    except ConfigError:
        return None
    assert (result.attention_mask_BKS == 1).all()
    return result.input_ids_BKS[0, 0].tolist(), result.cut


def _around(template: str, part: str, case: dict[str, Any]) -> tuple[str, str]:
    """The text before and after a part of the filled template."""
    before, after = (side.format(**case) for side in template.split(part))
    return before, after


@pytest.mark.parametrize("template", ORDERS)
@pytest.mark.parametrize("family", ["tokenizer", "bart", "t5"])
def test_only_tokens_at_the_end_of_the_text_are_ever_dropped(
    family: str, template: str, request: pytest.FixtureRequest
) -> None:
    fast = request.getfixturevalue(family)

    @settings(max_examples=80)
    @given(st.fixed_dictionaries(CASES))
    @example(SPACES)
    @example(EMOJI)
    def holds(case: dict[str, Any]) -> None:
        filled, room = template.format(**case), case["room"]
        whole = fast(filled, return_offsets_mapping=True, return_special_tokens_mask=True)
        full, spans, special = (whole[name] for name in ("input_ids", "offset_mapping", "special_tokens_mask"))
        before, after = _around(template, "{text}", case)
        result = _assembled(fast, template, case)
        if len(full) <= room:
            assert result == (full, 0)
            return
        if result is None:
            # A token or two may reach from the text into its neighbours.
            assert len(fast(before + after)["input_ids"]) + 2 > room
            return
        ids, cut = result
        assert (len(ids), cut) == (room, 1)
        start, end, excess = len(before), len(before) + len(case["text"]), len(full) - room

        def of_text(place: int) -> bool:
            first, last = spans[place]
            return not special[place] and last <= end and not filled[first:start].strip()

        # The dropped tokens are consecutive, and the last tokens of the text.
        assert any(
            ids == full[:at] + full[at + excess :]
            and all(of_text(place) for place in range(at, at + excess))
            and not any(start <= spans[place][0] < spans[place][1] <= end for place in range(at + excess, len(full)))
            for at in range(room + 1)
        )
        if family == "bart":
            decoded = fast.decode(ids)
            assert decoded.startswith("<s>" + before.rstrip())
            assert decoded.endswith(after + "</s>")
            assert case["question"].strip() in decoded

    holds()


@pytest.mark.parametrize("template", ORDERS)
def test_without_offsets_the_context_holds_a_prefix_of_the_text_and_one_character_more_would_not_fit(
    marian: MarianTokenizer, template: str
) -> None:
    assert not marian.is_fast

    @settings(max_examples=50)
    @given(st.fixed_dictionaries(CASES))
    @example(SPACES)
    @example(EMOJI)
    def holds(case: dict[str, Any]) -> None:
        result, room = _assembled(marian, template, case), case["room"]
        lengths = range(len(case["text"]) + 1)
        prefixes = [marian(template.format(**case | {"text": case["text"][:n]}))["input_ids"] for n in lengths]
        if len(prefixes[-1]) <= room:
            assert result == (prefixes[-1], 0)
        elif result is None:
            assert len(prefixes[0]) > room
        else:
            ids, cut = result
            assert cut == 1
            assert len(ids) <= room
            assert ids[-1] == marian.eos_token_id
            fits = [n for n in lengths if prefixes[n] == ids]
            assert fits
            assert len(prefixes[fits[-1] + 1]) > room

    holds()


def test_each_cut_context_of_a_batch_counts_once(tokenizer, marian: MarianTokenizer) -> None:
    passages_BK = [[LONG, PASSAGES[0][0], LONG], [PASSAGES[1][0], LONG, PASSAGES[1][0]]]
    for each_tokenizer in (tokenizer, marian):
        contexts = assemble_contexts(each_tokenizer, PromptConfig(max_context_tokens=100), QUESTIONS, passages_BK, CPU)
        assert contexts.cut == 3
        assert (contexts.attention_mask_BKS.sum(2) > 90).tolist() == [[True, False, True], [False, True, False]]
