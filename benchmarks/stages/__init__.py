"""Whole stages."""
