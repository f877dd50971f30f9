"""Bodies of products that are not a weight's own: Pallas kernels for GPUs and TPUs."""
