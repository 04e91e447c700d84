"""Prefect flows, one a file; `flows.cli` is the command line above them."""

# First of all: it switches usage reports off, and the tools look at that when they are imported.
import rag_core  # noqa: F401
