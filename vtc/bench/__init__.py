"""Wall-clock measurements of compression on models of real shape with random weights."""
