"""Knowing before renting: what a server of a model would be on a topology, without the hardware and without weights.

`python -m serving.plan` compiles the server's own programs for the target from the model's configuration alone and reports
memory, pages, collectives and roofline times. docs/plan.md explains the numbers.
"""
