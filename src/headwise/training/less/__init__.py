"""Training of LESS: a model, policies and texts -> the features that its evicted state is read and written by."""
