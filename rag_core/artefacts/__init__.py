"""Folders that stages publish: written, locked, read, fetched from object stores, verified, repaired.

`artefact.py` is the door. Only `artefact_contents.py` and `repair.py` know what the kinds of artefacts hold; they ask the owners.
"""
