"""The types of facts, and the templates that state facts (passages) and ask for them (questions).

Passages use other words than questions. So an untrained encoder finds the right entity, but often the wrong passage
of it: end-to-end training has to teach which fact a question asks for. This was measured with untrained MiniLM
(docs/log.md); if you change a wording, measure again. This module does not know where facts come from.

`{name}` stands for the entity, `{value}` for the answer as the passage states it.
"""

from __future__ import annotations

from dataclasses import dataclass

CITY_TYPES = ("country", "population", "time_zone")
COUNTRY_TYPES = ("capital", "currency", "continent", "languages", "calling_code", "national_population", "area")
TYPES = CITY_TYPES + COUNTRY_TYPES


@dataclass(frozen=True, slots=True)
class Wordings:
    """Templates of one type of fact: passages, questions, and questions that only test uses."""

    passages: tuple[str, ...]
    questions: tuple[str, ...]
    test_only_questions: tuple[str, ...]


WORDINGS: dict[str, Wordings] = {
    "country": Wordings(
        passages=(
            "{name} is found on the map of {value}.",
            "{value} counts {name} among its towns.",
            "{name} is ruled by the laws of {value}.",
            "A letter to {name} is posted to {value}.",
        ),
        questions=(
            "Which country is {name} in?",
            "In what nation would you find {name}?",
            "{name} is part of which state?",
        ),
        test_only_questions=(
            "What country do travellers to {name} visit?",
            "Whose national flag flies over {name}?",
        ),
    ),
    "population": Wordings(
        passages=(
            "{name} numbers close to {value} souls.",
            "{name} has some {value} mouths to feed.",
            "A roll call of {name} would list {value} or so.",
            "Roughly {value} answer to the mayor of {name}.",
        ),
        questions=(
            "How many inhabitants has {name}?",
            "What is the population of {name}?",
            "How populous is {name}?",
        ),
        test_only_questions=(
            "What is the head count of {name}?",
            "How large a population does {name} have?",
        ),
    ),
    "time_zone": Wordings(
        passages=(
            "People in {name} set their watches by {value}.",
            "Offices in {name} shut by {value}.",
            "Shops in {name} open and close by {value}.",
            "Trains leave {name} by {value}.",
        ),
        questions=(
            "Which time zone is used in {name}?",
            "What is the time zone of {name}?",
            "In which zone is local time reckoned at {name}?",
        ),
        test_only_questions=(
            "What time zone applies to {name}?",
            "Which zone tells the time of day in {name}?",
        ),
    ),
    "capital": Wordings(
        passages=(
            "{name} is governed from {value}.",
            "The government of {name} sits in {value}.",
            "{value} is the chief city of {name}.",
        ),
        questions=(
            "What is the capital of {name}?",
            "Which city is the capital of {name}?",
            "Name the capital city of {name}.",
        ),
        test_only_questions=(
            "Which city is the seat of power in {name}?",
            "Where would an ambassador to {name} reside?",
        ),
    ),
    "currency": Wordings(
        passages=(
            "Shops in {name} take the {value}.",
            "Prices in {name} are quoted in {value}.",
            "Wages in {name} are paid in {value}.",
        ),
        questions=(
            "What is the currency of {name}?",
            "Which money is used in {name}?",
            "What currency do people spend in {name}?",
        ),
        test_only_questions=(
            "Which legal tender circulates in {name}?",
            "What money should a visitor to {name} carry?",
        ),
    ),
    "continent": Wordings(
        passages=(
            "{name} is a part of {value}.",
            "Geographers count {name} as {value}.",
            "On the globe, {name} is shown with {value}.",
        ),
        questions=(
            "On which continent is {name}?",
            "Which continent does {name} belong to?",
            "What continent is {name} located on?",
        ),
        test_only_questions=(
            "In which part of the world is {name}?",
            "{name} lies on what continent?",
        ),
    ),
    "languages": Wordings(
        passages=(
            "People in {name} speak {value}.",
            "In the streets of {name} one hears {value}.",
            "Schools in {name} teach in {value}.",
        ),
        questions=(
            "Which language is spoken in {name}?",
            "What is a main language of {name}?",
            "What language do the inhabitants of {name} use?",
        ),
        test_only_questions=(
            "What tongue is common in {name}?",
            "In which language does one talk to locals of {name}?",
        ),
    ),
    "calling_code": Wordings(
        passages=(
            "To ring somebody in {name} from abroad, dial {value} first.",
            "Dial {value} to reach friends in {name}.",
            "Calls to {name} start with {value}.",
        ),
        questions=(
            "What is the calling code of {name}?",
            "Which international prefix do phones in {name} have?",
            "What is the country code for phoning {name}?",
        ),
        test_only_questions=(
            "What is the telephone code of {name}?",
            "Which digits come before a phone number of {name}?",
        ),
    ),
    "national_population": Wordings(
        passages=(
            "Some {value} men, women and children have their homes in {name}.",
            "{name} has some {value} mouths to feed.",
            "{name} numbers close to {value} souls.",
        ),
        questions=(
            "What is the population of {name}?",
            "How many inhabitants has {name}?",
            "How populous is {name}?",
        ),
        test_only_questions=(
            "What is the head count of {name}?",
            "How large a population does {name} have?",
        ),
    ),
    "area": Wordings(
        passages=(
            "{name} covers {value} square kilometres.",
            "{name} stretches over {value} square kilometres.",
            "From border to border {name} takes up {value} square kilometres.",
        ),
        questions=(
            "What is the area of {name}?",
            "How large is the surface of {name}?",
            "How big is the territory of {name}?",
        ),
        test_only_questions=(
            "How much land does {name} have?",
            "What is the size of {name}?",
        ),
    ),
}
