"""How the reference models were trained; frozen, described in README.md."""
