"""Answers: one, or many streams in one batch."""
