"""Gate: predicts what a repetition of the prompt would find, from what a layer has at hand; with its training."""
