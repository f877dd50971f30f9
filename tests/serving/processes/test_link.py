"""The stream between processes, without devices: handshake, meeting points, commands, digests, and what counts as lost."""

from __future__ import annotations

import contextlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest

from proto.jaxserve.v1 import processes_pb2 as pb
from proto.jaxserve.v1 import processes_pb2_grpc as rpc
from serving.engine.requests import commands
from serving.engine.requests.buckets import Bucket
from serving.processes.facts import difference, model_digest
from serving.processes.follower import Follower
from serving.processes.leader import Leader
from serving.processes.watch import Patience, ProcessLostError
from serving.processes.wire import decode, encode

LONG = Patience(silence=60.0, step=60.0)
SHORT = Patience(silence=60.0, step=0.2)


@pytest.fixture(autouse=True)
def short_goodbyes(monkeypatch):
    """Followers of these tests are no processes that end: a leader need not wait for it."""
    monkeypatch.setattr("serving.processes.leader.STOP_S", 0.1)


class Loss:
    """What a side was told about its end."""

    def __init__(self):
        self.reasons = []
        self.told = threading.Event()

    def __call__(self, reason):
        self.reasons.append(reason)
        self.told.set()

    def reason(self):
        assert self.told.wait(30)
        return self.reasons[0]


@contextlib.contextmanager
def leading(count=2, patience=LONG, **facts):
    """(leader, its loss, its address)"""
    loss = Loss()
    leader = Leader(count, facts, loss, patience)
    port = leader.listen("127.0.0.1")
    try:
        yield leader, loss, f"127.0.0.1:{port}"
    finally:
        leader.stop()


def following(address, index=1, patience=LONG, **facts):
    loss = Loss()
    return Follower(address, index, facts, loss, patience), loss


def meet(leader, *followers, value=0):
    """All come to one point, as at the start; what each got."""
    got = {}

    def come(side, mine):
        got[side] = side.least("here", mine)

    threads = [threading.Thread(target=come, args=(f, value + i)) for i, f in enumerate(followers, 1)]
    for thread in threads:
        thread.start()
    come(leader, value)
    for thread in threads:
        thread.join()
    return got


def some_commands():
    words = np.arange(6, dtype=np.int32)
    return [
        commands.LoadSlot(1, 3, np.array([1, 2], np.int16), words, words.astype(np.float32) / 3, words[:2]),
        commands.Forward(Bucket(2, 64, 4), words),
        commands.PromptLogprobs(66, words, words[::-1].copy()),
        commands.Pool(np.linspace(0, 1, 12, dtype=np.float32).reshape(2, 6)),
        commands.Sample(2, words, np.arange(8, dtype=np.int32).reshape(2, 4)),
        commands.Sample(2, words),
        commands.DecodeLoop(Bucket(2, 0, 0, 3), words, words + 1, 5),
        commands.PagesOut(words[:2] % 2, words[2:4], (b"\x00digest", b"another")),
        commands.PagesIn(words[:1], words[3:4], (b"another",)),
        commands.PagesDropped(words[:1], (b"\x00digest",)),
        commands.ClearStates(words[:2], words[2:4], words[:2] - 1),
        commands.LoadStates(words[:1], words[1:2], words[2:3]),
        commands.SaveStates(words[:1], words[1:2], words[2:3]),
    ]


def same(a, b):
    assert type(a) is type(b)
    for name in a.__dataclass_fields__:
        x, y = getattr(a, name), getattr(b, name)
        if isinstance(x, np.ndarray):
            assert x.dtype == y.dtype and x.shape == y.shape and (x == y).all(), name
        else:
            assert x == y, name


@pytest.mark.parametrize("command", some_commands(), ids=lambda c: type(c).__name__)
def test_commands_survive_the_wire(command):
    message = pb.Command.FromString(encode(command).SerializeToString())
    same(decode(message), command)


def test_commands_arrive_in_order_everywhere_and_peace_ends_them():
    with leading(3) as (leader, loss, address):
        followers = [following(address, i)[0] for i in (1, 2)]
        assert set(meet(leader, *followers, value=7).values()) == {7}
        sent = some_commands()
        for command in sent:
            leader.send(command)
        leader.sampled(1, np.arange(4))
        leader.stop()
        for follower in followers:
            got = list(follower.commands())
            assert len(got) == len(sent)
            for a, b in zip(got, sent, strict=True):
                same(a, b)
            follower.close()
        assert not loss.reasons


def test_a_leader_goes_after_its_followers(monkeypatch):
    monkeypatch.setattr("serving.processes.leader.STOP_S", 60.0)
    with leading() as (leader, loss, address):
        follower, _ = following(address)
        meet(leader, follower)
        stopping = threading.Thread(target=leader.stop)
        stopping.start()
        assert list(follower.commands()) == []
        assert stopping.is_alive(), "the follower still is"
        follower.close()
        stopping.join(30)
        assert not stopping.is_alive() and not loss.reasons


def test_other_flags_are_refused_on_both_sides():
    with leading(**{"--dtype": "float32", "jax's version": "1"}) as (leader, loss, address):
        follower, told = following(address, **{"--dtype": "bfloat16", "jax's version": "1"})
        expected = "process 1 has --dtype bfloat16, process 0 has float32: start all with the same flags."
        assert told.reason() == loss.reason() == expected
        with pytest.raises(ProcessLostError, match="--dtype"):
            leader.least("here", 0)
        with pytest.raises(ProcessLostError, match="--dtype"):
            follower.least("here", 0)


def test_two_processes_of_one_id_and_ids_out_of_range():
    with leading(3) as (_, loss, address):
        following(address, 1)
        assert "two processes call themselves 1" in following(address, 1)[1].reason()
        assert "themselves 1" in loss.reason()
    with leading(3) as (_, _, address):
        assert "calls itself 3" in following(address, 3)[1].reason()


def test_a_stranger_does_not_end_an_engine_that_is_complete():
    with leading() as (leader, loss, address):
        follower, _ = following(address)
        meet(leader, follower)
        assert "two processes call themselves 1" in following(address)[1].reason()
        with grpc.insecure_channel(address) as channel:
            assert "calls itself 0" in next(rpc.ProcessesStub(channel).Follow(iter(()))).end.reason
        leader.send(commands.Sample(1, np.zeros(1, np.int32)))
        assert next(follower.commands()).rows == 1 and not loss.reasons


def test_diverging_tokens_end_everybody():
    with leading(3) as (leader, loss, address):
        (one, one_told), (two, two_told) = following(address, 1), following(address, 2)
        meet(leader, one, two)
        for _ in range(2):
            leader.send(commands.Sample(1, np.zeros(1, np.int32)))
        one.sampled(1, np.array([5]))
        leader.sampled(1, np.array([5]))
        two.sampled(1, np.array([5]))
        two.sampled(2, np.array([5]))
        one.sampled(2, np.array([6]))
        for told in (loss, one_told, two_told):
            assert "sampled other tokens than the rest in step 2" in told.reason()
        with pytest.raises(ProcessLostError, match="diverged"):
            list(one.commands())


def test_a_follower_that_dies():
    with leading(3) as (leader, loss, address):
        (one, _), (two, told) = following(address, 1), following(address, 2)
        meet(leader, one, two)
        one._call.cancel()  # what the kernel does to a dead process's connection
        assert loss.reason() == told.reason() == "process 1 is gone: its connection closed."


def test_a_follower_that_gives_up_says_why():
    with leading() as (leader, loss, address):
        follower, _ = following(address)
        meet(leader, follower)
        follower.close("it is on fire.")
        assert loss.reason() == "process 1 ended: it is on fire."


def test_a_leader_that_dies():
    with leading() as (leader, _, address):
        follower, told = following(address)
        meet(leader, follower)
        leader._server.stop(None)
        assert told.reason() == "process 0 is gone: its connection closed."
        with pytest.raises(ProcessLostError, match="is gone"):
            list(follower.commands())


def test_a_follower_that_freezes():
    """Its connection stands, but it says nothing."""
    with leading(patience=Patience(silence=0.3, step=60.0)) as (leader, loss, address):
        hold = threading.Event()

        def silent():
            yield pb.FollowRequest(hello=pb.Hello(process_id=1))
            hold.wait(60)

        with grpc.insecure_channel(address) as channel:
            answers = rpc.ProcessesStub(channel).Follow(silent())
            assert next(answers).HasField("welcome")
            assert "process 1 has been silent for" in loss.reason()
            assert any(message.end.reason.startswith("process 1 has been silent") for message in answers)
            hold.set()
        with pytest.raises(ProcessLostError):
            leader.least("here", 0)


def test_a_leader_that_freezes():
    class Silent(rpc.ProcessesServicer):
        def Follow(self, request_iterator, context):  # noqa: N802
            yield pb.FollowResponse(welcome=pb.Welcome())
            for _ in request_iterator:
                pass

    server = grpc.server(ThreadPoolExecutor(2))
    rpc.add_ProcessesServicer_to_server(Silent(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    follower, told = following(f"127.0.0.1:{port}", patience=Patience(silence=0.3, step=60.0))
    assert "process 0 has been silent for" in told.reason()
    follower.close()
    server.stop(None)


def test_a_step_that_never_ends_is_laid_to_whoever_did_not_end_it():
    with leading(3, Patience(silence=1e9, step=60.0)) as (leader, loss, address):
        (one, _), (two, told) = following(address, 1), following(address, 2)
        meet(leader, one, two)
        leader.send(commands.Sample(1, np.zeros(1, np.int32)))
        leader.sampled(1, np.array([5]))
        one.sampled(1, np.array([5]))
        meet(leader, one, two)  # what was said before has been heard then
        assert leader._look(time.monotonic()) is None
        leader.lose(leader._look(time.monotonic() + LONG.step - 1) or leader._look(time.monotonic() + LONG.step + 1))
        reason = loss.reason()
        assert reason.startswith("step 1 has not ended after") and reason.endswith("in process 2.")
        assert told.reason() == reason


def test_a_follower_notices_its_own_step():
    with leading() as (leader, loss, address):
        follower, told = following(address, patience=SHORT)
        meet(leader, follower)
        leader.send(commands.Sample(1, np.zeros(1, np.int32)))
        assert "step 1 has not ended" in told.reason()
        follower.close("stuck.")
        assert "process 1 ended: stuck." in loss.reason()


def test_starting_may_take_as_long_as_it_likes():
    with leading(patience=SHORT) as (leader, loss, address):
        follower, _ = following(address, patience=SHORT)
        late = threading.Timer(2 * SHORT.step, follower.least, ("here", 3))
        late.start()
        assert leader.least("here", 5) == 3
        assert not loss.reasons
        late.join()


def test_model_digest_follows_content_and_not_place(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "sub" / "weights").write_bytes(bytes(range(256)) * 20000)
    assert model_digest(tmp_path / "a") == model_digest(tmp_path / "b")
    (tmp_path / "b" / "sub" / "weights").write_bytes(bytes(range(256)) * 19999 + bytes(256))
    assert model_digest(tmp_path / "a") != model_digest(tmp_path / "b")


def test_differences_are_sentences():
    assert difference(2, {"--mesh": "model=4"}, {"--mesh": "model=4"}) is None
    said = difference(2, {"the model's files": "0" * 32}, {"the model's files": "1" * 32})
    assert said == (
        "the model's files are not the same in process 2 as in process 0: install and copy the same everywhere."
    )
    assert "is 1 in process 2 and 2 in process 0" in difference(2, {"jax's version": "1"}, {"jax's version": "2"})
