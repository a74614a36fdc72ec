"""Scoring rules: from an answer to a number."""
