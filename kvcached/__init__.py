"""kvcached: a persistent, shared, compressed KV cache for language models. The daemon and its tools."""

__version__ = "0.1.0"
