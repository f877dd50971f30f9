"""Commands as protobuf messages and back. Arrays travel as little-endian bytes; their shapes follow from the configuration."""

from __future__ import annotations

import hashlib
import sys

import numpy as np

from proto.jaxserve.v1 import processes_pb2 as pb
from serving.engine.requests import commands
from serving.engine.requests.buckets import Bucket

assert sys.byteorder == "little", "arrays are sent as they lie in memory"


def encode(command: commands.Command) -> pb.Command:
    """The message of a command."""
    match command:
        case commands.Forward(bucket, packed, adapted):
            forward = pb.Forward(bucket=_bucket(bucket), packed=packed.tobytes(), adapted=adapted)
            return pb.Command(forward=forward)
        case commands.LoadAdapter(slot, packed):
            return pb.Command(load_adapter=pb.LoadAdapter(slot=slot, packed=packed.tobytes()))
        case commands.Sample(rows, packed, mask, _, adapted):
            sample = pb.Sample(rows=rows, packed=packed.tobytes(), adapted=adapted)
            if mask is not None:
                sample.mask = mask.tobytes()
            return pb.Command(sample=sample)
        case commands.DecodeLoop(bucket, forward, sample, steps):
            loop = pb.DecodeLoop(
                bucket=_bucket(bucket), forward=forward.tobytes(), sample=sample.tobytes(), steps=steps
            )
            return pb.Command(decode_loop=loop)
        case commands.LoadSlot(replica, slot, seen, ids, values, banned):
            load = pb.LoadSlot(
                replica=replica,
                slot=slot,
                seen=seen.tobytes(),
                bias_ids=ids.tobytes(),
                bias_values=values.tobytes(),
                banned_ids=banned.tobytes(),
            )
            return pb.Command(load_slot=load)
        case commands.Pool(weights):
            return pb.Command(pool=pb.Pool(tokens=command.tokens, weights=weights.tobytes()))
        case commands.PromptLogprobs(tokens, rows, targets, adapters):
            own = None if adapters is None else adapters.tobytes()
            scored = pb.PromptLogprobs(tokens=tokens, rows=rows.tobytes(), targets=targets.tobytes(), adapters=own)
            return pb.Command(prompt_logprobs=scored)
        case commands.Draft() | commands.CatchUp():
            raise AssertionError("a draft model runs in a single process: serving.boot.draft sees to it")
        case commands.Encode():
            raise AssertionError("images are read in a single process: serving.boot.senses.tower sees to it")
        case commands.PagesOut():
            return pb.Command(pages_out=_moves(command))
        case commands.PagesIn():
            return pb.Command(pages_in=_moves(command))
        case commands.ClearStates():
            return pb.Command(clear_states=_states(command))
        case commands.LoadStates():
            return pb.Command(load_states=_states(command))
        case commands.SaveStates():
            return pb.Command(save_states=_states(command))
        case commands.PagesDropped(replicas, keys):
            return pb.Command(pages_dropped=pb.PageMoves(replicas=replicas.tobytes(), keys=keys))


def decode(message: pb.Command) -> commands.Command:
    """The command of a message.

    Raises:
        ValueError: a kind that this version does not know.
    """
    match message.WhichOneof("command"):
        case "forward":
            m = message.forward
            return commands.Forward(_to_bucket(m.bucket), np.frombuffer(m.packed, np.int32), m.adapted)
        case "load_adapter":
            m = message.load_adapter
            return commands.LoadAdapter(m.slot, np.frombuffer(m.packed, np.float32))
        case "sample":
            m = message.sample
            mask = np.frombuffer(m.mask, np.int32).reshape(m.rows, -1) if m.HasField("mask") else None
            return commands.Sample(m.rows, np.frombuffer(m.packed, np.int32), mask, adapted=m.adapted)
        case "decode_loop":
            m = message.decode_loop
            forward, sample = np.frombuffer(m.forward, np.int32), np.frombuffer(m.sample, np.int32)
            return commands.DecodeLoop(_to_bucket(m.bucket), forward, sample, m.steps)
        case "load_slot":
            m = message.load_slot
            return commands.LoadSlot(
                m.replica,
                m.slot,
                np.frombuffer(m.seen, np.int16),
                np.frombuffer(m.bias_ids, np.int32),
                np.frombuffer(m.bias_values, np.float32),
                np.frombuffer(m.banned_ids, np.int32),
            )
        case "pool":
            m = message.pool
            return commands.Pool(np.frombuffer(m.weights, np.float32).reshape(-1, m.tokens))
        case "prompt_logprobs":
            m = message.prompt_logprobs
            rows, targets = np.frombuffer(m.rows, np.int32), np.frombuffer(m.targets, np.int32)
            own = np.frombuffer(m.adapters, np.int32) if m.HasField("adapters") else None
            return commands.PromptLogprobs(m.tokens, rows, targets, own)
        case "pages_out":
            return commands.PagesOut(*_from_moves(message.pages_out))
        case "pages_in":
            return commands.PagesIn(*_from_moves(message.pages_in))
        case "clear_states":
            return commands.ClearStates(*_from_states(message.clear_states))
        case "load_states":
            return commands.LoadStates(*_from_states(message.load_states))
        case "save_states":
            return commands.SaveStates(*_from_states(message.save_states))
        case "pages_dropped":
            replicas, _, keys = _from_moves(message.pages_dropped)
            return commands.PagesDropped(replicas, keys)
        case kind:
            raise ValueError(f"process 0 sent a command of the unknown kind {kind!r}.")


def digest(tokens: np.ndarray) -> bytes:
    """16 bytes that differ where sampled tokens do."""
    return hashlib.blake2b(np.ascontiguousarray(tokens, np.int32).tobytes(), digest_size=16).digest()


def _moves(command: commands.PageMoves) -> pb.PageMoves:
    return pb.PageMoves(replicas=command.replicas.tobytes(), pages=command.pages.tobytes(), keys=command.keys)


def _from_moves(moves: pb.PageMoves) -> tuple[np.ndarray, np.ndarray, tuple[bytes, ...]]:
    return np.frombuffer(moves.replicas, np.int32), np.frombuffer(moves.pages, np.int32), tuple(moves.keys)


def _states(command: commands.StateMoves) -> pb.StateMoves:
    return pb.StateMoves(
        replicas=command.replicas.tobytes(), slots=command.slots.tobytes(), rows=command.rows.tobytes()
    )


def _from_states(moves: pb.StateMoves) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    replicas, slots, rows = (np.frombuffer(raw, np.int32) for raw in (moves.replicas, moves.slots, moves.rows))
    return replicas, slots, rows


def _bucket(bucket: Bucket) -> pb.Bucket:
    return pb.Bucket(decode=bucket.decode, chunk=bucket.chunk, rows=bucket.rows, queries=bucket.queries)


def _to_bucket(bucket: pb.Bucket) -> Bucket:
    return Bucket(bucket.decode, bucket.chunk, bucket.rows, bucket.queries)
