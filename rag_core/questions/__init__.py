"""Files to questions."""
