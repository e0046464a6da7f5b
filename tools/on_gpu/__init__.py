"""On a GPU: what `tools/gpu.py` checks and times there, part by part, each in processes of its own."""
