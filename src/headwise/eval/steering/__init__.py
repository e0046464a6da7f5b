"""Steering: prompts with something marked, and ways to tell a model so -> whether it does what is marked."""
