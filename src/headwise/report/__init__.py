"""Report, 7/7: what a cache holds -> data, words, a picture."""
