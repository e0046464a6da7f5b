"""The parts of `tools/mutate.py`: what is drawn, what it is tried with, and how."""
