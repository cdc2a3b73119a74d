"""For tests alone: a stand-in for the part of the `sgl_kernel` wheel that mini-sglang's attention imports.

First on the import path it takes the place of the wheel, whose FlashAttention 3 is too large to carry
everywhere. The plugin's own kernels are `sglang_nsa.sgl_kernel` and never go by this name.
"""
