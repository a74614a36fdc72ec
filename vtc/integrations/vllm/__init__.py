"""Run vLLM's own models with fewer visual tokens; found through its entry-point group ``vllm.general_plugins``.

    VTC_METHOD=divprune VTC_KEEP_RATIO=0.25 vllm serve CHECKPOINT

`plugin` is what vLLM calls, in each of its processes. It puts a subclass in the place of every covered architecture
(`families`). `processing` is the processor's side of it: settings (`settings`) become part of every picture, and fewer
placeholders go into the prompt. `models` and `qwen` are the model's side: the rows that a method of the library chooses
(`choosing`) take the places of the placeholders.

Importing this package imports nothing of vLLM.
"""
