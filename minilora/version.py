"""The version of this package; a file that nothing has to be imported back from."""

__version__ = "0.1.0"
