"""Gate: what a layer has at hand of a prompt -> what a repetition of it would find."""
