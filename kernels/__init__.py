"""fastp2p.kernels: the Triton kernels, one file per operator. None has landed yet: each runs its reference."""
