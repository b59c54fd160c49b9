"""vast-proxy: a reverse proxy that gets unmodified Vast.ai clients through the rate limits."""

__version__ = "0.1.0"
