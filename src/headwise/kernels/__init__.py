"""Kernels: attention over a prompt and over pages of kept rows; a plain definition, and the back ends that are fast."""
