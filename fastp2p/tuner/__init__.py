"""The tuner: the fastest kernel for each convolution, measured, kept and compiled ahead."""
