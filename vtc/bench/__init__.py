"""Measurements of compression on models of real shape with random weights.

`prefill`, `tower`, `overhead`, `selectors` and `kernels` define the options of `vtc bench` and import torch only when
they run.
"""
