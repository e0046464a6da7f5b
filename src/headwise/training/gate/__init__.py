"""Training of gates: a model and texts -> networks that predict what a repetition of the prompt would find."""
