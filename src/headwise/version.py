"""Version: nothing -> the release of this package, for records and for `headwise --version`."""

__version__ = "0.1.0"
