"""Objectives, loop, checkpoints, random draws."""
