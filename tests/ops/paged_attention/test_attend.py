"""Every body of paged attention against the spelled-out reference, over one table of shapes."""

import dataclasses
import functools
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops import native, paged_attention
from ops.linear.weights.rotation import hadamard
from ops.paged_attention import pages, reference
from ops.paged_attention.batch import Q_BLOCK, KVSpec
from ops.paged_attention.cases import TEST_CASES, Arguments, Case, make_arguments
from ops.rope import inverse_frequencies, rope
from tests.ops.paged_attention import against_reference
from tests.ops.paged_attention.against_reference import (
    assert_is_reference,
    assert_new_keys_are_stored,
    expected,
    plain,
)

# (backend, layout of the pages, native instruction set). Attention has no kernels of its own for the level "vnni".
XLA = [("xla", "rows", "")]
NATIVE = [("native", "panels", isa) for isa in ("generic", "avx2", "avx512", "bf16")]


def bodies(bodies):
    return pytest.mark.parametrize("body", bodies, ids=lambda body: "-".join(filter(None, body)))


@pytest.fixture(autouse=True)
def best_isa():
    yield
    if native.available():
        native.set_isa(None)


def fill(case: Case, arguments: Arguments, dtype, body) -> paged_attention.KVPages:
    """Pages in a body's layout holding the case's history, leftovers of other requests included."""
    backend, layout, isa = body
    dtype = np.dtype(dtype)
    if backend == "native":
        if not native.available():
            pytest.skip(native.status())
        if not paged_attention.native.supports(case.spec, case.page_size, dtype, "cpu"):
            pytest.skip("no native kernel for this shape and dtype")
        if native.set_isa(isa) != isa:
            pytest.skip(f"this CPU has no {isa}")
    kv = pages.allocate(case.spec, len(arguments.history_k), case.page_size, dtype, None, layout)
    new = {}
    for name, history in (("k", arguments.history_k), ("v", arguments.history_v)):
        if history is None:
            continue
        rows_NKsh = history.swapaxes(1, 2)
        if kv.mixed:
            matrix = hadamard(rows_NKsh.shape[-1] & -rows_NKsh.shape[-1])
            rows_NKsh = (rows_NKsh.reshape(*rows_NKsh.shape[:-1], -1, len(matrix)) @ matrix).reshape(rows_NKsh.shape)
        if dtype == np.int8:
            new[name + "_scale"] = np.abs(rows_NKsh).max(-1) / np.float32(127)
            with np.errstate(invalid="ignore"):
                rows_NKsh = np.round(rows_NKsh / new[name + "_scale"][..., None]).astype(dtype)
        else:
            rows_NKsh = rows_NKsh.astype(dtype)
        if layout == "panels":
            N, K, s, h = rows_NKsh.shape
            n = 4 // dtype.itemsize  # so many side by side
            if name == "k":  # channels before slots
                rows_NKsh = rows_NKsh.reshape(N, K, s, h // n, n).transpose(0, 1, 3, 2, 4)
            else:  # tokens before channels
                rows_NKsh = rows_NKsh.reshape(N, K, s // n, n, h).swapaxes(-1, -2)
            rows_NKsh = rows_NKsh.reshape(getattr(kv, name).shape)
        new[name] = rows_NKsh
    return dataclasses.replace(kv, **{name: jnp.array(x) for name, x in new.items()})


def run(body, arguments: Arguments, kv, dtype=np.float32):
    return against_reference.run(body[0], arguments, kv, dtype)


# XLA has no code of its own for these shapes; a compilation of its loop costs a second.
SHAPES_OF_KERNELS = {
    "multi_head", "odd_group", "big_group", "head_24", "head_80", "head_128", "value_head_larger", "page_32", "page_64",
    "decode_padded_rows", "decode_nothing_real", "window_beyond", "chunk_fresh", "verify_multi_head", "verify_big_group",
    "verify_page_32", "verify_one_place",
}  # fmt: skip
# Every instruction set shares the code that places, masks and splits; these go through each one's arithmetic.
ARITHMETIC = [
    "decode",
    "verify",
    "chunk_past_group",
    "everything",
    "verify_everything",
    "big_group",
    "head_80",
    "value_head_smaller",
    "page_32",
]
FLOAT32 = [(name, body) for body in XLA for name in TEST_CASES if name not in SHAPES_OF_KERNELS]
FLOAT32 += [(name, NATIVE[-1]) for name in TEST_CASES]
FLOAT32 += [(name, body) for body in NATIVE[:-1] for name in ARITHMETIC]


@pytest.mark.parametrize("name,body", FLOAT32, ids=lambda x: x if isinstance(x, str) else "-".join(filter(None, x)))
def test_float32_matches_reference(name, body):
    case = TEST_CASES[name]
    arguments = make_arguments(case)  # leftovers are NaN: whoever lets one in is found out
    out, kv = run(body, arguments, fill(case, arguments, np.float32, body))
    assert_is_reference(arguments, out, kv)


@pytest.mark.parametrize("name,dtype", [("page_32", np.float32), ("everything", "bfloat16"), ("everything", "int8")])
def test_xla_reads_panels(name, dtype):
    """Plain XLA is the fallback for whatever a kernel declines, so it serves every layout."""
    case = TEST_CASES[name]
    arguments = make_arguments(case)
    out, kv = run(("xla", "panels", ""), arguments, fill(case, arguments, dtype, ("xla", "panels", "")))
    np.testing.assert_allclose(out, expected(arguments, kv), atol=2e-5)


NARROW = [(name, dtype, XLA[0]) for name in ("everything", "latent") for dtype in ("bfloat16", "int8", "float8_e4m3fn")]
NARROW += [
    (name, dtype, body)
    for body in NATIVE
    for dtype in ("bfloat16", "int8")
    for name in ("decode", "verify", "chunk_rows", "everything", "value_head_smaller", "page_32")
]


@pytest.mark.parametrize(
    "name,dtype,body", NARROW, ids=lambda x: x if isinstance(x, str) else "-".join(filter(None, x))
)
def test_narrow_pages(name, dtype, body):
    case = TEST_CASES[name]
    arguments = make_arguments(case)
    out, kv = run(body, arguments, fill(case, arguments, dtype, body))
    # Products of bfloat16 round weights and queries to 8 bits, the native ones of int8 to 15; XLA's to none.
    atol = {"bfloat16": 1.6e-2, "int8": 3e-4}.get(dtype, 2e-5)
    np.testing.assert_allclose(out, expected(arguments, kv), atol=atol)
    assert_new_keys_are_stored(arguments, kv, dtype)


@bodies(XLA + NATIVE[-1:])
def test_bfloat16_activations(body):
    case = TEST_CASES["mixed"]
    arguments = make_arguments(case)
    out, kv = run(body, arguments, fill(case, arguments, "bfloat16", body), jnp.bfloat16)
    np.testing.assert_allclose(out, expected(arguments, kv), atol=3e-2)


@bodies(XLA + NATIVE)
@pytest.mark.parametrize("name", ["mixed", "verify_mixed"])
def test_padded_tokens_yield_zeros(name, body):
    case = TEST_CASES[name]
    arguments = make_arguments(case)
    out, _ = run(body, arguments, fill(case, arguments, np.float32, body))
    padding = arguments.batch.kv_index_T == 0
    assert padding.any() and (out[padding] == 0).all() and (out[~padding] != 0).any(axis=(1, 2, 3)).all()


@bodies(XLA + NATIVE)
@pytest.mark.parametrize(
    "name,last", [("everything", (1,)), ("verify_everything", (0,)), ("chunk_rows", (0, 3, 0, 16))]
)
@pytest.mark.parametrize("dtype", [np.float32, "int8"])
def test_only_the_last_tokens_of_pieces_attend(dtype, name, last, body):
    case = TEST_CASES[name]
    arguments = make_arguments(case)
    batch, asked_T = jax.tree.map(np.asarray, arguments.batch.last(np.array(last, np.int32)))
    assert asked_T[arguments.batch.num_decode_tokens :].sum() == sum(last)
    whole, whole_kv = run(body, arguments, fill(case, arguments, dtype, body))
    out, kv = run(body, dataclasses.replace(arguments, batch=batch), fill(case, arguments, dtype, body))
    compare = np.testing.assert_array_equal if body[0] == "native" else np.testing.assert_allclose
    compare(out[asked_T], whole[asked_T], **({} if body[0] == "native" else {"atol": 2e-5}))
    assert (out[~asked_T] == 0).all(axis=(1, 2, 3)).sum() >= (~asked_T).sum() - len(last) * (Q_BLOCK - 1)
    for mine, wanted in zip(plain(kv), plain(whole_kv), strict=True):
        np.testing.assert_array_equal(mine[1:], wanted[1:])  # all are kept


@pytest.mark.parametrize("dtype", [np.float32, "bfloat16", "int8"])
@bodies([*XLA, NATIVE[0]])
def test_pages_are_updated_in_place(body, dtype):
    case = Case(decode=(30, 31), chunks=((5, 20),))
    arguments = make_arguments(case)
    fill(case, arguments, dtype, body)  # skips where there is no kernel
    kv = pages.allocate(case.spec, 5000, case.page_size, dtype, None, body[1])
    options = {name: value for name, value in arguments.options.items() if name != "sinks_KG"}
    with paged_attention.use_backend(body[0]):
        traced = jax.jit(functools.partial(paged_attention.attend, **options), donate_argnums=3)
        program = traced.lower(arguments.q_TKGh, arguments.k_TKh, arguments.v_TKh, kv, arguments.batch).compile()
    memory = program.memory_analysis()
    assert memory is not None
    stored = sum(leaf.nbytes for leaf in jax.tree.leaves(kv))
    assert memory.alias_size_in_bytes >= stored
    assert memory.temp_size_in_bytes < stored // 3, "the program keeps a second copy of the pages"


@bodies(XLA + NATIVE[-1:])
@pytest.mark.parametrize("with_rope", [True, False])
def test_attend_rope_is_rope_then_attend(with_rope, body):
    case = TEST_CASES["everything"]
    arguments = make_arguments(case)
    options = dict(arguments.options)
    sinks_KG = options.pop("sinks_KG")
    rotary = (
        inverse_frequencies({"rope_theta": 100.0, "partial_rotary_factor": 0.5}, case.head_dim) if with_rope else None
    )
    q, k, v, batch = arguments.q_TKGh, arguments.k_TKh, arguments.v_TKh, arguments.batch
    positions_T = np.arange(len(q), dtype=np.int32) * 3
    rotated_q, rotated_k = q, k
    if rotary is not None:
        rotated_q, rotated_k = (np.asarray(rope(x, positions_T, *rotary)) for x in (q, k))
    want, want_kv = run(
        body, dataclasses.replace(arguments, q_TKGh=rotated_q, k_TKh=rotated_k), fill(case, arguments, np.float32, body)
    )
    qkv = np.concatenate([q, k[:, :, None], v[:, :, None]], axis=2)
    with paged_attention.use_backend(body[0]):
        out, kv = jax.jit(
            lambda qkv, positions_T, kv, batch: paged_attention.attend_rope(
                qkv, positions_T, rotary, kv, batch, sinks_KG=sinks_KG, **options
            )
        )(qkv, positions_T, fill(case, arguments, np.float32, body), batch)
    np.testing.assert_allclose(out, want, atol=1e-5)
    np.testing.assert_allclose(plain(kv)[0][1:], plain(want_kv)[0][1:], atol=1e-5)


@bodies(XLA + NATIVE)
@pytest.mark.parametrize("name", ["everything", "verify_mixed"])
def test_pages_that_another_layer_wrote_are_only_read(name, body):
    case = TEST_CASES[name]
    arguments = make_arguments(case)
    want, written = run(body, arguments, fill(case, arguments, np.float32, body))
    options = {key: value for key, value in arguments.options.items() if key != "sinks_KG"}
    with paged_attention.use_backend(body[0]):
        attend = jax.jit(functools.partial(paged_attention.attend, **options))
        out, kv = attend(
            arguments.q_TKGh, None, None, written, arguments.batch, sinks_KG=arguments.options.get("sinks_KG")
        )
    np.testing.assert_allclose(out, want, atol=1e-6)
    for now, before in zip(plain(kv), plain(written), strict=True):
        np.testing.assert_array_equal(now[1:], before[1:])


def test_heads_split_over_a_mesh():
    """Each device holds its own heads' pages and answers for them, natively or not."""
    command = [sys.executable, "-m", "tests.ops.paged_attention.attend_on_mesh"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    root = pathlib.Path(__file__).parents[3]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    apart = dict(line.split() for line in done.stdout.splitlines())
    assert apart.keys() == ({"native", "xla"} if native.available() else {"xla"})
    assert all(float(difference) < 2e-5 for difference in apart.values()), apart


def test_bytes_per_page():
    spec = KVSpec(num_kv_heads=3, head_dim=64, v_head_dim=32)
    assert paged_attention.bytes_per_page(spec, 16, np.float32) == 16 * 3 * 96 * 4
    assert paged_attention.bytes_per_page(spec, 16, jnp.bfloat16) == 16 * 3 * 96 * 2
    assert paged_attention.bytes_per_page(spec, 16, np.int8) == 16 * 3 * (96 + 8)
    for dtype in (np.float32, jnp.bfloat16, np.int8):
        kv = paged_attention.allocate(spec, 10, 16, dtype)
        stored = sum(leaf.nbytes for leaf in jax.tree.leaves(kv))
        assert stored == 10 * paged_attention.bytes_per_page(spec, 16, dtype)


def test_wrong_arguments_are_explained():
    spec = KVSpec(num_kv_heads=3, head_dim=64, v_head_dim=64)
    with pytest.raises(ValueError, match="int32"):
        paged_attention.allocate(spec, 10, 16, np.int32)
    with pytest.raises(ValueError, match="at least 2 pages"):
        paged_attention.allocate(spec, 1, 16, np.float32)
    with pytest.raises(ValueError, match="Unknown attention backend 'fast'"), paged_attention.use_backend("fast"):
        pass


def test_chunks_of_positions():
    """Positions attend within their own piece of 24 alone; prompts' pieces lie across the limits."""
    case = Case(decode=(1, 24, 25, 100, 0), chunks=((0, 20), (20, 30), (47, 3), (90, 40)), pad_blocks=1)
    arguments = make_arguments(case)
    kv = fill(case, arguments, np.float32, ("xla", "rows", ""))
    a = arguments
    history = (a.history_k, a.history_v)
    for softcap in (None, 5.0):
        options = a.options | {"chunk": 24, "softcap": softcap}
        wanted, *_ = reference.attend(a.q_TKGh, a.k_TKh, a.v_TKh, *history, a.batch, **options)
        attend = jax.jit(functools.partial(paged_attention.attend, **options))
        got, _ = attend(a.q_TKGh, a.k_TKh, a.v_TKh, kv, a.batch)
        np.testing.assert_allclose(got, wanted, atol=2e-5)
        whole, *_ = reference.attend(a.q_TKGh, a.k_TKh, a.v_TKh, *history, a.batch, **options | {"chunk": None})
        assert np.abs(whole - wanted).max() > 0.1


@pytest.mark.parametrize("name", ["chunk_rows", "everything"])
def test_xla_off_the_cpu(name):
    """On other platforms the plain body takes all blocks of a chunk at once; its arithmetic is the same anywhere."""
    case = TEST_CASES[name]
    arguments = make_arguments(case)
    kv = dataclasses.replace(fill(case, arguments, np.float32, XLA[0]), platform="gpu")
    out, kv = run(XLA[0], arguments, kv)
    np.testing.assert_allclose(out, expected(arguments, kv), atol=2e-5)


def test_pages_of_larger_heads_change_nothing():
    """What layers with smaller heads write and read of arrays that they share with others."""
    case = Case(decode=(37, 0), chunks=((16, 5),), num_kv_heads=2, group=2, head_dim=16)
    arguments = make_arguments(case)
    wide = dataclasses.replace(case.spec, head_dim=24, v_head_dim=24)
    own = against_reference.fill(case, arguments, "float32", "rows")
    filled = [np.pad(history, [(0, 0)] * 3 + [(0, 8)]) for history in (arguments.history_k, arguments.history_v)]
    larger = against_reference.fill(
        dataclasses.replace(case, head_dim=24),
        dataclasses.replace(arguments, history_k=filled[0], history_v=filled[1]),
        *("float32", "rows"),
    )
    assert larger.spec == wide
    out, own = against_reference.run("xla", arguments, own)
    found, larger = against_reference.run("xla", arguments, larger)
    np.testing.assert_allclose(found, out, rtol=1e-6, atol=1e-6)
    for name in ("k", "v"):
        np.testing.assert_array_equal(np.asarray(getattr(larger, name))[..., :16], np.asarray(getattr(own, name)))
    parts = (arguments.q_TKGh, arguments.k_TKh[:, :, None], arguments.v_TKh[:, :, None])
    qkv, positions = np.concatenate(parts, axis=2), np.arange(len(arguments.q_TKGh))
    rotary = inverse_frequencies({"rope_theta": 1e4}, 16)
    rotated = jax.jit(functools.partial(paged_attention.attend_rope, rotary=rotary, scale=0.25))
    both = [rotated(qkv, positions, kv=kv, batch=arguments.batch)[0] for kv in (own, larger)]
    np.testing.assert_allclose(both[1], both[0], rtol=1e-5, atol=1e-5)
