"""Readers of question files: containers (JSON Lines, JSON, CSV, Parquet, gzip) and layouts (data sets' keys).

The two are independent. A container turns a file into records with their places; a layout maps one record to the
keys of a question. `rag_core.questions.questions` builds the questions and checks that ids are unique.
"""
