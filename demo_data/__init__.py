"""The demo's data: makes passages and questions from real facts about cities and countries."""
