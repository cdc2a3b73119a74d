"""The metadata benchmark in parts; run it with `python -m sglang.bench_metadata`."""
