"""What exists for CPUs only: packed weights, bf16 kernels, the heap."""
