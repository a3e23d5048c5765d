"""Families of language models: a folder each, with all that is known of one."""
