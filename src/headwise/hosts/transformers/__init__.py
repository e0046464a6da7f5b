"""The only folder that imports transformers: its cache contract, its attention interface, its models."""
