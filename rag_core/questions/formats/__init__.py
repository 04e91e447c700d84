"""Question files as people have them: containers (JSON Lines, JSON, CSV, Parquet, gzip) and layouts (data sets' keys).

The two are independent: a container turns a file into records with their places, a layout turns one record into the keys
of a question. What a question is, and that ids are unique, is `rag_core.questions.questions`' business.
"""
