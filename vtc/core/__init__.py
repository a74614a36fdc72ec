"""Values and rules that know tensors and nothing of models: contexts, selections, packing, ranges of options."""
