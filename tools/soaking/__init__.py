"""Parts of `tools/soak.py` and `tools/long_run.py`."""
