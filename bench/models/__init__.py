"""Whole denoiser forwards and samplings, ours beside the peers: `python -m bench.models`."""
