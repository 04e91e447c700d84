"""The demo's corpus: real facts about cities and countries, turned into passages and questions by our own code."""
