"""The version, in a module of its own: what is below the package's face needs it, too."""

__version__ = "0.1.0"
