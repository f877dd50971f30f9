"""How tools pack weights in few bits: each scheme says which tensors it stands behind, what they need, and their float32 values."""
