"""Scenes: seeded pictures with questions, hard enough to tell token selectors apart."""
