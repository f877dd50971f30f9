"""Heads: small networks that guess the tokens behind a model's next one from its hidden states.

`mtp.py` has those that come inside of a model's checkpoint, `eagle3.py` those that are trained for a model afterwards.
`serving/engine/device/head.py` runs them.
"""

from models.heads.head import Head, Said

__all__ = ["Head", "Said"]
