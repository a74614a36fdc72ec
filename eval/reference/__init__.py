"""The reference models: the ``vtc-reference`` distribution under ``src/`` and, beside it, the code that makes it."""
