"""Steering: spans that a user marks, and heads of a model -> what is added to the logits of columns, head by head."""
