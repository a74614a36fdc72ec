"""Evaluation harness of vtc: tasks, reference models, metrics. Runs from a checkout, is not part of the wheel."""
