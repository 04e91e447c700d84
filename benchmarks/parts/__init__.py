"""Models and passages that several benchmarks use."""
