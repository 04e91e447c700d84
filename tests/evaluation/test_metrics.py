"""Answer metrics against independent references: another way of computing them, and brute force."""

from __future__ import annotations

import itertools
import json
import random
import re
import string
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rag_core.evaluation.metrics import (
    character_tokens,
    exact_match,
    f1,
    has_answer,
    has_regex_answer,
    normalize_answer,
    recall_at_k,
    regex_exact_match,
)

XQUAD = Path(__file__).resolve().parents[3] / "shared/data/xquad.en.json"


@pytest.fixture(scope="module")
def xquad_answers() -> list[tuple[str, str]]:
    """Pairs of an answer and its paragraph."""
    if not XQUAD.is_file():
        pytest.skip(f"the shared test data is absent: {XQUAD}")
    data = json.loads(XQUAD.read_text(encoding="utf-8"))["data"]
    paragraphs = [paragraph for article in data for paragraph in article["paragraphs"]]
    return [(a["text"], p["context"]) for p in paragraphs for qa in p["qas"] for a in qa["answers"]]


def reference_words(text: str) -> list[str]:
    """SQuAD's normalisation by scanning characters: articles are runs of word characters, no regular expression."""
    kept = "".join(char for char in text.lower() if char not in string.punctuation)
    runs = ["".join(run) for _, run in itertools.groupby(kept, key=str.isalnum)]
    return "".join(" " if run in ("a", "an", "the") else run for run in runs).split()


def reference_f1(prediction: str, answer: str) -> float:
    """F1 by striking out matched words one by one; the Dice form of the formula."""
    left, right = reference_words(prediction), reference_words(answer)
    if not left or not right:
        return float(left == right)
    total, matched = len(left) + len(right), 0
    for word in left:
        if word in right:
            right.remove(word)
            matched += 1
    return 2 * matched / total


def perturbed(text: str, rng: random.Random) -> str:
    words = text.split() or [""]
    choice = rng.randrange(6)
    if choice == 0:
        return f"The {text.upper()}!"
    if choice == 1:
        return " ".join(words[: rng.randint(0, len(words))])
    if choice == 2:
        return " ".join([*words, *words[:2], "an", "extra"])
    if choice == 3:
        return "a–".join(words) + "\u00a0the"
    if choice == 4:
        return "".join(char for char in text if rng.random() < 0.9)
    return "-".join(words)


def test_em_and_f1_equal_an_independent_reference_on_all_xquad_answers(xquad_answers: list[tuple[str, str]]) -> None:
    rng = random.Random(0)
    answers = [answer for answer, _ in xquad_answers]
    partial = 0
    for answer in answers:
        for prediction in (answer, perturbed(answer, rng), perturbed(answer, rng), rng.choice(answers)):
            assert normalize_answer(prediction).split() == reference_words(prediction)
            assert exact_match(prediction, [answer]) == float(reference_words(prediction) == reference_words(answer))
            assert f1(prediction, [answer]) == pytest.approx(reference_f1(prediction, answer), abs=1e-12)
            partial += 0 < f1(prediction, [answer]) < 1
    assert partial > 500


@pytest.mark.parametrize(
    ("text", "normalised"),
    [
        ("The  Cat, a hat & an owl.", "cat hat owl"),
        ("theatre another", "theatre another"),
        ("A.D. 70", "ad 70"),
        ("24–10", "24–10"),
        ("the–end", "–end"),
        ("U.S.A.", "usa"),
        ("ÉCOLE the\u00a0a", "école"),
    ],
)
def test_normalisation_follows_the_official_script_by_hand_computed_cases(text: str, normalised: str) -> None:
    assert normalize_answer(text) == normalised


def test_f1_by_hand_is_the_harmonic_mean_of_precision_and_recall() -> None:
    assert f1("the big red dog", ["red dog house here"]) == pytest.approx(2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4))
    assert f1("dog dog dog", ["dog"]) == pytest.approx(0.5)


def test_the_best_gold_answer_counts() -> None:
    assert exact_match("L", ["Super Bowl L", "L"]) == 1.0
    assert f1("Super Bowl", ["none", "Super Bowl L", "Bowl"]) == pytest.approx(0.8)


def test_an_empty_prediction_is_right_only_for_an_empty_answer() -> None:
    assert (exact_match("", ["cat"]), f1("", ["cat"])) == (0.0, 0.0)
    assert (exact_match("the", [""]), f1("the", ["a"])) == (1.0, 1.0)


def test_a_question_without_answers_is_right_only_if_nothing_is_predicted() -> None:
    assert (exact_match("", []), f1("", [])) == (1.0, 1.0)
    assert (exact_match("cat", []), f1("cat", [])) == (0.0, 0.0)


def reference_tokens(text: str) -> list[str]:
    """DrQA's SimpleTokenizer by Unicode categories, one character at a time."""
    tokens: list[str] = []
    in_word = False
    for char in unicodedata.normalize("NFD", text):
        category = unicodedata.category(char)[0]
        is_word = category in "LNM"
        if is_word and in_word:
            tokens[-1] += char
        elif category not in "ZC":
            tokens.append(char)
        in_word = is_word
    return [token.lower() for token in tokens]


def reference_has_answer(text: str, answer: str) -> bool:
    tokens, needle = reference_tokens(text), reference_tokens(answer)
    return any(tokens[i : i + len(needle)] == needle for i in range(len(tokens) - len(needle) + 1))


def test_has_answer_equals_dprs_window_search_on_xquad(xquad_answers: list[tuple[str, str]]) -> None:
    rng = random.Random(1)
    contexts = [context for _, context in xquad_answers]
    verdicts = set()
    for answer, context in xquad_answers:
        for text, needle in ((context, answer), (rng.choice(contexts), answer), (context, answer[1:].upper() or "x")):
            assert has_answer(text, [needle]) == reference_has_answer(text, needle), (needle, text)
            verdicts.add(has_answer(text, [needle]))
    assert verdicts == {True, False}


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        ("He lives in New   YORK city.", "new york", True),
        ("He lives in Newark", "new", False),
        ("the 24–10 win", "24 10", False),
        ("the 24–10 win", "24 – 10", True),
        ("in Malmö today", "Malmo\u0308", True),
        ("in Malmö today", "Malmo", False),
        ("ab c", "a bc", False),
        ("anything", "", False),
        ("", "x", False),
    ],
)
def test_an_answer_is_found_as_whole_tokens_in_sequence(text: str, answer: str, expected: bool) -> None:
    assert has_answer(text, [answer]) is expected


def test_any_one_of_several_answers_is_enough() -> None:
    assert has_answer("Paris is big", ["London", "paris"])
    assert not has_answer("Paris is big", [])


def test_recall_counts_a_hit_among_the_first_k() -> None:
    hits = [[False, True, False], [True], [False, False, False, True], []]
    assert recall_at_k(hits, [1, 2, 3, 4, 100]) == {1: 0.25, 2: 0.5, 3: 0.5, 4: 0.75, 100: 0.75}


@pytest.mark.parametrize(("hits", "ks"), [([], [1]), ([[True]], [0])])
def test_recall_over_nothing_is_an_error_and_not_a_number(hits: list[list[bool]], ks: list[int]) -> None:
    with pytest.raises(ValueError, match="recall_at_k"):
        recall_at_k(hits, ks)


# Composed letters, dashes and symbols, without the typographic quotes, in which the rule differs from the scripts.
PUBLISHED = st.text(st.sampled_from("aAbthe' \"-.,()[]$%&/\\\t\n0123é–—ßÅ§½Ж東ア"), max_size=24)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(PUBLISHED, PUBLISHED)
def test_the_default_rule_equals_the_published_ones(prediction: str, answer: str) -> None:
    assert normalize_answer(prediction).split() == reference_words(prediction)
    assert exact_match(prediction, [answer]) == float(reference_words(prediction) == reference_words(answer))
    assert f1(prediction, [answer]) == pytest.approx(reference_f1(prediction, answer), abs=1e-12)
    if reference_tokens(answer):
        assert has_answer(prediction, [answer]) == reference_has_answer(prediction, answer)
        assert has_answer(f"{prediction} {answer}", [answer])


@pytest.mark.parametrize(
    ("written", "gold"),
    [
        ("O’Brien", "O'Brien"),
        ("“Help!”", '"Help!"'),
        ("Rock ‘n’ Roll", "Rock 'n' Roll"),
        ("Hawaiʼi", "Hawai'i"),
        ("Malmo\u0308", "Malm\u00f6"),
        ("\u1112\u1161\u11ab", "\ud55c"),
    ],
)
def test_typographic_quotes_and_other_forms_of_a_letter_make_no_difference(written: str, gold: str) -> None:
    for left, right in ((written, gold), (gold, written)):
        assert (exact_match(left, [right]), f1(left, [right])) == (1, 1)
        assert has_answer(f"Then {left} came.", [right])


def test_dashes_stay_apart_as_in_the_published_script_but_not_by_characters() -> None:
    assert exact_match("1914–1918", ["1914-1918"]) == 0
    assert exact_match("1914–1918", ["1914-1918"], "characters") == 1


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("東京タワー", ["東", "京", "タ", "ワ", "ー"]),
        ("ＡＢＣ１２ Corp、本社。", ["abc12", "corp", "本", "社"]),
        ("ｶﾞﾗｽ", ["ガ", "ラ", "ス"]),
        ("서울특별시", ["서", "울", "특", "별", "시"]),
        ("กรุงเทพ", ["ก", "รุ", "ง", "เ", "ท", "พ"]),
        ("Straße 5", ["strasse", "5"]),
        ("", []),
    ],
)
def test_scripts_without_spaces_are_taken_letter_by_letter_and_other_words_whole(text: str, tokens: list[str]) -> None:
    assert character_tokens(text) == tokens


def test_the_rule_by_characters_scores_as_counted_by_hand() -> None:
    # 3 of 4 predicted and 3 of 5 gold characters are the same.
    assert f1("東京タア", ["東京タワー"], "characters") == pytest.approx(2 * 3 / 9)
    assert exact_match("「東京タワー」。", ["東京 タワー"], "characters") == 1
    assert has_answer("日本の東京タワーは高い。", ["東京タワー"], "characters")
    assert not has_answer("日本の東京タワーは高い。", ["東京タワー"])
    assert not has_answer("京東タワー", ["東京"], "characters")
    assert has_answer("In Newark", ["newark"], "characters")
    assert not has_answer("In Newark", ["new"], "characters")


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.text(st.sampled_from("abthe '-.,()$0123"), max_size=20),
    st.text(st.sampled_from("abthe '-.,()$0123"), max_size=20),
)
def test_on_english_text_both_rules_give_the_same_em_and_f1(prediction: str, answer: str) -> None:
    assert exact_match(prediction, [answer], "characters") == exact_match(prediction, [answer])
    assert f1(prediction, [answer], "characters") == pytest.approx(f1(prediction, [answer]))


def drqa_regex_match(text: str, pattern: str, *, anywhere: bool) -> bool:
    """DrQA's `regex_match_score` and DPR's `regex_match`, with Python's own `re`."""
    compiled = re.compile(pattern, flags=re.IGNORECASE + re.UNICODE + re.MULTILINE)
    return (compiled.search(text) if anywhere else compiled.match(text)) is not None


@pytest.mark.parametrize(
    "pattern", [r"France|French\s?Republic", r"^\d{4}$", r"\bLyon\b", r"Malm(o|ö)", r"1[,.]?000", r"(?i)oslo"]
)
@pytest.mark.parametrize(
    "text", ["FRANCE", "the french republic", "x\n1999\ny", "in Lyon.", "Malmö", "Lyonnais", "1,000", "", "OSLO"]
)
def test_regular_expressions_match_as_pythons_do_in_drqa(pattern: str, text: str) -> None:
    assert regex_exact_match(text, [pattern]) == drqa_regex_match(text, pattern, anywhere=False)
    nfd, nfd_pattern = (unicodedata.normalize("NFD", string) for string in (text, pattern))
    assert has_regex_answer(text, [pattern]) == drqa_regex_match(nfd, nfd_pattern, anywhere=True)
    assert regex_exact_match(text, ["no such", pattern]) == regex_exact_match(text, [pattern])
