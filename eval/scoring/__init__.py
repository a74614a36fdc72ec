"""How benchmarks turn an answer into a number."""
