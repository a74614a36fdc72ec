"""Scenes: generated pictures with questions that distinguish token selectors."""
