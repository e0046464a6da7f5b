"""Command line: words -> a command that is run; one file each, named as the command.

`main` knows them all. `options` are defined once for several commands; what a command finds out goes to `tables`, whose
modules have the word in their names. Torch is imported inside functions: `headwise --help` does without it.
"""
