"""Containers: one module per kind of file. Each yields `Record`s and rejects, and knows no layout."""
