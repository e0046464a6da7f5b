"""Training: texts -> passages of them, and runs that can be gone on with; for all that is trained for a model."""
