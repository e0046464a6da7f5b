"""Compiled CPU kernels: tensors in main memory -> what `headwise.kernels.reference` defines, at the speed of memory."""
