"""Where Python's collector of cyclic garbage would pause a process that serves."""

from __future__ import annotations

import gc


def freeze_gc() -> None:
    """Exempts all objects that there are from collection: what a process loads to serve stays until it ends.

    A full collection walks every object, of which torch, the libraries and a model leave some 200,000:
    200 ms in which no token is made, at a moment that chance chooses. Afterwards it walks the newer ones.
    """
    gc.collect()
    gc.freeze()
