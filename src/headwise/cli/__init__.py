"""Command line: `headwise generate`, `profile`, `bench`, `eval`, `policies` and `doctor`; one file each."""
