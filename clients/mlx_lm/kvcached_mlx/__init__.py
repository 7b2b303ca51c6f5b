"""mlx-lm prompt caches in kvcached: offload what is evicted, restore what comes back."""

from .fingerprint import DEFAULT_BLOCK_SIZE, fingerprint, fresh_cache, model_spec
from .policy import Policy
from .store import PromptStore
from .tree import UnsupportedCacheError

__version__ = "0.1.0"
__all__ = [
    "DEFAULT_BLOCK_SIZE",
    "Policy",
    "PromptStore",
    "UnsupportedCacheError",
    "fingerprint",
    "fresh_cache",
    "model_spec",
]
