"""docs/peers.md shows what its program prints, and what the page says of these numbers holds."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest

from benchmarks.peers.one_example import PEERS, Row, rows

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "peers.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def table() -> dict[tuple[str, str], Row]:
    return {(row.computes, row.who.split()[0]): row for row in rows(None)}


def test_the_page_shows_every_row_that_needs_no_other_environment(table: dict[tuple[str, str], Row]) -> None:
    lines = [row.as_line().replace(version("transformers"), "5.23.0") for row in table.values()]
    assert len(lines) == 10
    assert [line for line in lines if line not in PAGE] == []


@pytest.mark.parametrize("method", ["RAG-Sequence, BART", "RAG-Token, BART", "RAG-Sequence, Llama", "RAG-Token, Llama"])
def test_our_likelihood_is_the_definition(table: dict[tuple[str, str], Row], method: str) -> None:
    definition, ours = table[method, "by"], table[method, "rag-pipeline"]
    assert ours.nlls == pytest.approx(definition.nlls, abs=1e-10)
    assert ours.gradients == pytest.approx(definition.gradients, abs=1e-8)


def test_hugging_face_differs_in_answers_of_one_token_of_rag_sequence_alone(table: dict[tuple[str, str], Row]) -> None:
    token, sequence = table["RAG-Token, BART", "Transformers"], table["RAG-Sequence, BART", "Transformers"]
    assert token.nlls == pytest.approx(table["RAG-Token, BART", "by"].nlls)
    ours = table["RAG-Sequence, BART", "rag-pipeline"]
    assert sequence.nlls[1] == pytest.approx(ours.nlls[1])
    assert sequence.nlls[0] < ours.nlls[0] - 0.1
    assert sequence.gradients[0] == 0


@pytest.mark.skipif(not PEERS.exists(), reason="`make peers` has not installed the peers")
def test_the_page_shows_the_rows_of_the_installed_peers() -> None:
    lines = [row.as_line() for row in rows(PEERS)]
    assert len(lines) == 14
    assert [line for line in lines if line not in PAGE] == []
