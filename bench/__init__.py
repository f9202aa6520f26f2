"""Benchmarks: interleaved, against peers and against the machine's limits."""
