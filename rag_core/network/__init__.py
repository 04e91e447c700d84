"""Addresses, probes of servers, and usage reports switched off."""
