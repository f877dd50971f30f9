import numpy as np
import pytest

from ops.activation import ACTIVATIONS, activation

WEIGHTED = {"prelu", "xielu"}  # have weights of their own


def test_every_activation_is_transformers():
    torch = pytest.importorskip("torch")
    from transformers.activations import ACT2CLS, ACT2FN

    assert set(ACT2CLS) - set(ACTIVATIONS) == WEIGHTED
    x = np.linspace(-12, 12, 481, dtype=np.float32)
    for name in ACTIVATIONS:
        wanted = ACT2FN[name](torch.tensor(x)).numpy()
        np.testing.assert_allclose(activation(name)(x), wanted, rtol=2e-6, atol=2e-6, err_msg=name)
