"""/v1/files and /v1/batches, and the runner of batch files that `python -m serving.batch` uses too."""
