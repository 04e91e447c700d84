"""Passage ids that are made of what a file holds, and that gold passages are named by as well.

Whoever reads a corpus and whoever reads its questions call the same functions, so that the two agree. SQuAD's ids are in
`rag_core.corpus.formats.squad`, beside its layout.
"""

from __future__ import annotations


def kilt_passage_id(wikipedia_id: str | int, paragraph: int) -> str:
    """The passage id of one paragraph of a page of KILT's knowledge source.

    Args:
        wikipedia_id: the page, as `provenance` names it.
        paragraph: its place in the page's list `text`, from 0; `start_paragraph_id` to `end_paragraph_id` in a provenance.
    """
    return f"{wikipedia_id}:{paragraph}"
