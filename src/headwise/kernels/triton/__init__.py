"""Triton kernels: tensors on a GPU -> what `headwise.kernels.reference` defines."""
