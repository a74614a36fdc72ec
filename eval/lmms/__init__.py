"""The offline task as files that lmms-eval reads."""
