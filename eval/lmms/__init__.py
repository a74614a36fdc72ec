"""Writes the offline task as files for lmms-eval."""
