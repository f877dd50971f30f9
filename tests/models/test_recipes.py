import numpy as np
import pytest

from models.recipes import Computed, Piece, Rows, Stack, alternating, deal, one, row_map, split


def values(*shape: int, dtype: type = np.float32) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape).astype(dtype)


STORED = {
    "q": values(2 * 3 * 4, 5),
    "k": 1000 + values(2 * 4, 5),
    "v": 2000 + values(2 * 4, 5),
    "turned": values(3, 5, 12),  # [E, in, 2 F]
    "biases": values(3, 12),
    "kv_b": values(2 * 7, 5),
}
Q, K, V = (Piece(name, STORED[name].shape) for name in "qkv")
TURNED = Piece("turned", (3, 5, 12), turned=True)
BIASES = Piece("biases", (3, 12), vector=True)


def by_head() -> np.ndarray:
    parts = [STORED["q"].reshape(2, 3, 4, 5), *(STORED[n].reshape(2, 1, 4, 5) for n in "kv")]
    return np.concatenate(parts, axis=1).reshape(-1, 5)


def shards_of(array_E2FD: np.ndarray, shards: int) -> np.ndarray:
    """[E, F of gate, F of up] -> [E, S, 2, F / S]."""
    E, both, *rest = array_E2FD.shape
    return np.moveaxis(array_E2FD.reshape(E, 2, shards, both // 2 // shards, *rest), 1, 2).reshape(-1, *rest)


TURNED_ROWS = STORED["turned"].swapaxes(1, 2)
GATE_FIRST = np.concatenate([TURNED_ROWS[:, 0::2], TURNED_ROWS[:, 1::2]], axis=1)
BIAS_GATE_FIRST = np.concatenate([STORED["biases"][:, 0::2], STORED["biases"][:, 1::2]], axis=1)

CASES = {
    "one": (Q, STORED["q"]),
    "heads": (deal(2, Q, K, V), by_head()),
    "one tensor of heads": (deal(2, *split(Piece("q", (24, 5)), 12, 6, 6)), None),
    "turned": (TURNED, TURNED_ROWS.reshape(-1, 5)),
    "gate, then up": (deal(3 * 2, *split(TURNED, 6, 6)), shards_of(TURNED_ROWS, 2)),
    "gate and up alternate": (deal(3 * 3, *alternating(TURNED, 2)), shards_of(GATE_FIRST, 3)),
    "biases alternate": (deal(3, *alternating(BIASES, 2)), shards_of(BIAS_GATE_FIRST, 1)),
    "part of each head": (
        Rows(Piece("kv_b", (14, 5)), 3, block=7),
        STORED["kv_b"].reshape(2, 7, 5)[:, 3:].reshape(-1, 5),
    ),
    "stacked": (Stack((deal(2, K, V), deal(2, V, K))), None),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [np.float32, "bfloat16"])
def test_a_recipe_arranges_rows_and_its_map_says_which(case, dtype):
    import ml_dtypes  # noqa: F401 - registers bfloat16

    recipe, wanted = CASES[case]
    stored = {name: array.astype(dtype) for name, array in STORED.items()}
    made = recipe.make(stored.__getitem__)
    if wanted is not None:
        np.testing.assert_array_equal(made.astype(np.float32), wanted.astype(dtype).astype(np.float32))
    piece_R, row_R = row_map(recipe)
    rows = [piece.rows_of(stored[piece.name]) for piece in recipe.pieces]
    followed = np.stack([rows[piece][row] for piece, row in zip(piece_R, row_R, strict=True)])
    np.testing.assert_array_equal(made.astype(np.float32), followed.astype(np.float32))


def test_pieces_come_once_and_of_different_dtypes_in_float32():
    recipe = deal(2, *split(Q, 6, 6), K)
    assert [piece.name for piece in recipe.pieces] == ["q", "k"]
    made = recipe.make({"q": STORED["q"].astype(np.float16), "k": STORED["k"] + 0.0001}.__getitem__)
    assert made.dtype == np.float32
    np.testing.assert_array_equal(made[-4:], STORED["k"][-4:] + np.float32(0.0001))


def test_computed_values_have_no_map():
    recipe = one("biases", 3, 12, assemble=lambda array: array + 1)
    assert row_map(recipe) is None and row_map(deal(1, recipe)) is None
    np.testing.assert_array_equal(recipe.make(STORED.__getitem__), STORED["biases"] + 1)
    assert isinstance(recipe, Computed) and recipe.pieces == (Piece("biases", (3, 12)),)
