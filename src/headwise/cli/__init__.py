"""Command line: `headwise generate`, `profile`, `bench`, `policies` and `doctor`; one file each."""
