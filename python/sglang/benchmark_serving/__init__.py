"""The load generator in parts; run it with `python -m sglang.bench_serving`."""
