"""Containers: what is around a file's records. Each module yields `Record`s and rejects, and knows no layout."""
