"""What runs inside a compressed model.

Read in this order to follow one picture: `plan` (what will happen), `install` and `hooks` (how it gets onto a model),
`engine` and `compression` (the hooks, in the order of a call, and what they share), `encoder` and `recorder` (what is
read of the vision tower), `prompt` and `state` (what is known about a call), `choose`, `before_decoder`, `in_decoder`,
`after_prefill` (tokens leave), `updating` (hidden states change, none leaves), `masks` and `cache` (what later layers
need), `append` (tokens selected elsewhere).
"""
