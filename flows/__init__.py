"""Prefect flows, one per file; `flows.cli` is the command line above them."""

# Import rag_core first: it switches usage reports off, and the tools read that setting when they are imported.
import rag_core  # noqa: F401
