"""syncd keeps a second, verified copy of a dental practice's documents."""

__version__ = "0.1.0"
