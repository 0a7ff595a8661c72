"""megagrin: distributed pretraining of GRIN mixture-of-experts language models."""

__version__ = "0.1.0"
