"""fastp2p.kernels: the Triton kernels, one file per operator with its launcher under its kernels, and what they share.

`fastp2p.ops` registers the launchers; only tests and benchmarks call them directly.
"""
