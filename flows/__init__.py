"""Prefect flows, one a file; `flows.cli` is the command line above them."""
