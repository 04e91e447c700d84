"""Plots, tables, a pipeline's summary."""
