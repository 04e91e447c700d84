"""Generators alone: decoder-only models against plain code, and the memory of ways to train."""
