"""Command line: `headwise generate`, `profile`, `policies` and `doctor`; one file each."""
