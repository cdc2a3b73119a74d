"""mini-sglang with the static inputs of its decode graphs brought up to date by one launch, or inside the
graph.

`python -m sglang_nsa.minisgl ...` is mini-sglang's own server with this in each of its schedulers; for its
offline `LLM` call `install()` first. What happens is chosen by MINISGL_USE_FUSED_COPY.
"""

from .hooks import install
from .settings import Mode

__all__ = ["Mode", "install"]
