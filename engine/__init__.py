"""The selection engine: images -> features -> selection -> metrics."""

__version__ = "0.1.0"
