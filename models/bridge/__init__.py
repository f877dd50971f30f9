"""Architectures that have no family here, served by what transformers' own code computes.

`transformers` runs once, in a process of its own, on tensors without values: what it computes is recorded (`record.py`), with
attention, experts and masks replaced by ours (`stand_ins.py`), and becomes a `Trace` (`graph.py`): data, which is kept in the
user's cache folder. `module.py` makes a `models.api.CausalLM` of it, over our pages, weights and products; `aten.py` says what
each recorded operation is in JAX. Nothing of torch runs in a server, and a start that finds its trace does not import it.

Before a checkpoint is served for the first time, `check.py` compares it with what transformers computes of the same file.
"""
