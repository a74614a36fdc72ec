"""Values and rules that know tensors and nothing of models: signals, sites, actions, contexts, selections, packing."""
