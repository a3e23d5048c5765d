"""The stages of a language model's life that a federation can go through, one module each."""
