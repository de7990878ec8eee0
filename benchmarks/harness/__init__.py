"""What benchmarks share: one stopwatch, one description of a machine, one row format, one way to run a provider."""
