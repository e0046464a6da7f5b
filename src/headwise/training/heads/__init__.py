"""Heads: a model and prompts with two answers -> how much each head, steered alone, draws it to the marked one."""
