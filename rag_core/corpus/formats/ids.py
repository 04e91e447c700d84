"""Passage ids that are built from the file's content.

The readers of corpora and of questions call the same functions, so that gold passage ids match passage ids.
SQuAD's ids are in `rag_core.corpus.formats.squad`, beside its layout.
"""

from __future__ import annotations


def kilt_passage_id(wikipedia_id: str | int, paragraph: int) -> str:
    """The passage id of one paragraph of a page of KILT's knowledge source.

    Args:
        wikipedia_id: the page, as `provenance` names it.
        paragraph: its index in the page's list `text`, from 0. A provenance names `start_paragraph_id` to
            `end_paragraph_id`.
    """
    return f"{wikipedia_id}:{paragraph}"
