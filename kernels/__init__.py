"""fastp2p.kernels: the Triton kernels, one file per operator, each with its launcher under its kernels.

`fastp2p.ops` registers the launchers; nothing else calls them.
"""
