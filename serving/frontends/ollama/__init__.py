"""Ollama's API: for front ends that know nothing else."""
