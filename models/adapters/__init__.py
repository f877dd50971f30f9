"""LoRA adapters (Hu et al. 2021, arXiv:2106.09685): read from files, checked, and fitted to a network's parameters."""
