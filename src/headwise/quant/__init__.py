"""Quantization: rows of keys and values -> codes of 8 or 4 bits in pages like any other, read where they lie."""
