"""Valid samples for the targets: corpora and question files in every format and layout, as bytes."""

from __future__ import annotations

import json
from typing import Any

PASSAGES = [("a", "Lyon", "Lyon is a city."), ("b", "", 'Grüße, "quoted"\tand 😀.'), ("c", "T", "two\nlines")]

# Corpora
JSONL = [
    "".join(
        json.dumps({"id": id_, "title": title, "text": text}, ensure_ascii=False) + "\n"
        for id_, title, text in PASSAGES
    ).encode(),
    b'{"id": 7, "text": "one", "title": null}\r\n{"id": "x", "text": "\\u00fc"}',
]
TSV = [b'id\ttext\ttitle\n1\tone\tT\n2\t"two ""quoted""\nlines"\tT\n3\tthree\tT\n', b"text\tid\r\none\t1\r\ntwo\t2\r\n"]
QAS = [{"id": "1", "question": "q?", "answers": [{"text": "x", "answer_start": 0}]}, {"id": "2", "question": "r?"}]
SQUAD = [
    json.dumps(
        {"data": [{"title": "A", "paragraphs": [{"context": "c", "qas": QAS}, {"context": "d", "qas": []}]}]}
    ).encode(),
    b'{"version": "v2.0", "data": [{"title": "A", "paragraphs": [{"context": "y", "qas": [{"question": "s?"}]}]}, {"title": "B", "paragraphs": [{"context": "x", "qas": []}]}]}',
]
TEXT = [
    b"# Title #\n\none two. Three four!\n\n```sh\n# comment\n```\nfive six\n",
    "ein Satz.\r\n\r\nnoch „einer“.".encode(),
]
# One record of each layout of corpora.
CORPUS_LAYOUTS: tuple[dict[str, Any], ...] = (
    {"_id": "d1", "title": "Lyon", "text": "Lyon is a city.", "metadata": {}},
    {"id": "0", "contents": '"Lyon"\nLyon is a city.'},
    {
        "_id": "7",
        "wikipedia_id": "7",
        "wikipedia_title": "Lyon",
        "text": ["Lyon\n", "It is old.\n", "BULLET::::- one\n"],
    },
    {"id": "12", "title": "Lyon", "text": ["Lyon is a city.", " It is old."], "url": "u"},
    {"id": 3, "question": "q?", "context": [["Lyon", ["Lyon is a city."]], ["Oslo", ["One.", " Two."]]]},
    {"id": "q", "question": "q?", "context": {"title": ["Lyon", "Oslo"], "sentences": [["One.", " Two."], ["x"]]}},
    {"id": "q", "title": "Lyon", "question": "q?", "context": "Lyon is a city.", "answers": {"text": ["x"]}},
    {"docid": 5, "title": None, "text": "two\nlines"},
)
CORPUS_LAYOUTS_JSONL = [
    b"\n".join(json.dumps(row, ensure_ascii=number % 2 == 0).encode() for row in (record, record))
    for number, record in enumerate(CORPUS_LAYOUTS)
]
CORPUS_LAYOUTS_JSON = [
    json.dumps(list(CORPUS_LAYOUTS)).encode(),
    json.dumps({"data": CORPUS_LAYOUTS[:1] * 2, "version": "1"}, indent=1).encode(),
    json.dumps({"version": "1", "data": [CORPUS_LAYOUTS[6]]}).encode(),
    json.dumps({"d1": {"title": "T", "text": "x"}, "d2": {"text": "y"}}).encode(),
    json.dumps({"d1": "x", "d2": "Grüße 😀"}, indent=2).encode(),
    b"\n".join(json.dumps(row, indent=1).encode() for row in CORPUS_LAYOUTS[:3]),
    *SQUAD,
]
CORPUS_LAYOUTS_TABLES = [
    b'id,text,title\r\n1,"one, two",T\r\n2,"two ""quoted""\r\nlines",T\r\n',
    b"_id;title;text\nd1;T;one\nd2;;two\n",
    b"0\tone two\n1\tthree\n",
    b'id\tcontents\n1\t"""Lyon""\nLyon is a city."\n',
    b"id,title,context,question\n1,T,Lyon is a city.,q?\n",
]

# Questions
CTXS = [{"id": "p", "title": "T", "text": "t", "score": "81.5"}, {"id": 2, "text": "u", "score": -1}]
QUESTIONS = [
    {"id": 5, "question": "q?", "answers": ["a", "b"], "type": "2hop", "gold_passage_ids": ["p", 7]},
    {"question": "r?", "answer": "c", "ctxs": CTXS},
]
QUESTIONS_JSONL = [b"\n".join(json.dumps(record).encode() for record in QUESTIONS), json.dumps(QUESTIONS[1]).encode()]
QUESTIONS_LIST = [json.dumps(QUESTIONS).encode(), json.dumps(QUESTIONS[0]).encode()]
# One record of each layout of question files, with every form of its lists.
QUESTION_LAYOUTS = [
    {"id": "t0", "question": "q?", "golden_answers": ["a", "b"], "metadata": {"type": "x"}},
    {"id": "k1", "input": "q?", "output": [
        {"answer": "a", "provenance": [{"wikipedia_id": "11", "start_paragraph_id": 1, "end_paragraph_id": 2}]},
        {"provenance": []}]},
    {"question": "q?", "answers": ["a"], "positive_ctxs": [{"title": "T", "text": "t", "passage_id": "7"}, {"psg_id": 8}]},
    {"id": "s1", "title": "T", "context": "c", "question": "q?", "answers": {"text": ["a", "a"], "answer_start": [0, 0]}},
    {"Question": "q?", "QuestionId": "tc_1", "Answer": {"Value": "a", "Aliases": ["b"], "NormalizedAliases": ["b"]}},
    {"question": "r?", "question_id": "tc_2", "answer": {"value": "a", "aliases": ["b", "c"]}},
    {"_id": "h1", "question": "q?", "answer": "a", "type": "bridge", "supporting_facts": [["T", 0], ["U", 1]]},
    {"id": "h2", "question": "q?", "answer": "a", "supporting_facts": {"title": ["T"], "sent_id": [0]}},
    {"example_id": 5, "question_text": "q?", "document_text": "one <P> two three", "annotations": [
        {"short_answers": [{"start_token": 0, "end_token": 3}], "yes_no_answer": "NONE"}, {"yes_no_answer": "YES"}]},
    {"id": "n1", "question": {"text": "q?"}, "annotations": {
        "short_answers": [{"text": ["a"], "start_token": [1]}], "yes_no_answer": [-1]}},
    {"_id": "b1", "text": "q?", "metadata": {}},
    {"question": "q?", "possible_answers": ["a"]},
    {"utterance": "q?", "targetValue": '(list (description "a b") (description c))'},
    {"question": "q?", "answers": ["a\\s?b", "(c|d){2,3}"], "answers_are": "regex"},
    {"question": "q?", "answers": [], "is_impossible": True},
]  # fmt: skip
QUESTION_LAYOUTS_JSONL = [json.dumps(record).encode() for record in QUESTION_LAYOUTS] + [
    b"\n".join(json.dumps(record).encode() for record in QUESTION_LAYOUTS)
]
QUESTION_LAYOUTS_JSON = [
    json.dumps(QUESTION_LAYOUTS[2:6]).encode(),
    json.dumps({"Domain": "Web", "Data": [QUESTION_LAYOUTS[4]], "Version": 1.0}).encode(),
    json.dumps({"version": "x", "data": QUESTION_LAYOUTS[:3]}, indent=1).encode(),
    b'{"data": [{"paragraphs": [{"context": "c", "qas": [{"question": "q?", "answers": []}]}]}, {"title": "", "paragraphs": []}]}',
]
QUESTION_LAYOUTS_TABLES = [
    b'id,question,answers,type\n1,who?,"[\'a\', \'b\']",t\n2,"what, ""now""?","[""c""]",\n',
    b"question\tanswer\nwho?\ta\nwhat?\t['b', 'c']\n",
    b'301\twho?\n302\twhat "is" it?\n',
    b"question;answer;is_impossible\r\nwho?;a;False\r\nwhat?;;true\r\n",
]
QRELS = [b"query-id\tcorpus-id\tscore\nq1\td1\t1\nq1\td2\t0\nq2\td2\t2\n"]
QUESTIONS_CSV = [b'who?\t[\'Paris\', "it\'s"]\nwhere?\t["a\\u00fc"]\n"a ""b"""\t[]\n']
