"""Settings of the demo's corpus, and of how its entities are split into train, dev and test."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, model_validator


class GeonamesConfig(BaseModel):
    """How many cities the corpus covers, and how many entities only dev or only test may ask about."""

    # Frozen and so hashable: `load_entities` caches the entities of each config.
    model_config = ConfigDict(extra="forbid", frozen=True)

    num_cities: int = Field(
        4000,
        ge=20,
        le=20_000,
        description="Cities in the corpus: the largest ones with a unique name. Each gives three passages; "
        "the countries give about 1,700 more.",
    )
    seed: int = Field(13, ge=0, description="Chooses the split of the entities and the wordings.")
    test_cities: int = Field(120, ge=1, description="Cities that only test questions ask about, capitals apart.")
    dev_cities: int = Field(50, ge=1, description="Cities that only dev questions ask about, capitals apart.")
    test_countries: int = Field(40, ge=1, le=80, description="Countries that only test questions ask about.")
    dev_countries: int = Field(20, ge=1, le=40, description="Countries that only dev questions ask about.")
    train_wordings_city: int = Field(
        1, ge=1, le=3, description="Number of wordings in which training asks for each fact of a city."
    )
    train_wordings_country: int = Field(
        3, ge=1, le=3, description="The same for a country; more, because there are few countries."
    )

    @model_validator(mode="after")
    def _leaves_cities_to_train_on(self) -> GeonamesConfig:
        held_out = self.test_cities + self.dev_cities
        if held_out * 2 > self.num_cities:
            raise ValueError(
                f"test_cities + dev_cities is {held_out}, more than half of num_cities ({self.num_cities}): "
                f"training would have too few cities. Raise num_cities or hold out fewer."
            )
        return self
