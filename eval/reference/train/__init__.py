"""How the reference models are made: tower conversion, tokenizer, feature cache, training, export."""
