"""Viewer: a model, a text and a policy -> one page that shows which tokens every head holds, as the text goes on."""
