"""Clips: generated short videos with questions that need more than one frame."""
