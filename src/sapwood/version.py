"""The version, in the one place where it stands; the build reads it from here without importing anything."""

__version__ = "0.1.0"
