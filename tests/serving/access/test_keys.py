"""Keys: files, roles, comparison; rates."""

from __future__ import annotations

import hashlib
import hmac
import stat

import pytest

from serving.access import Access, KeyRing, Role
from serving.access import keys as module
from serving.access.__main__ import main
from serving.access.keys import Caller, file_line, new_secret
from serving.access.rates import RateMeter
from serving.errors import ErrorKind, RequestError

USER, ADMIN, WATCH = (f"sk-{name}-0123456789abcdef" for name in ("user", "admin", "watch"))


def test_a_file_holds_hashes_and_no_keys(tmp_path, capsys):
    file = tmp_path / "keys"
    assert main([str(file), "alice"]) == 0
    assert main([str(file), "ops", "--role", "admin"]) == 0
    alice, ops = capsys.readouterr().out.split()
    text = file.read_text()
    assert alice not in text and ops not in text and hashlib.sha256(alice.encode()).hexdigest() in text
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    ring = KeyRing.of(file=str(file))
    assert ring.find(alice) == Caller("alice", Role.USER) and ring.find(ops) == Caller("ops", Role.ADMIN)
    assert ring.find("sk-" + "x" * 43) is None and ring.find("") is None and ring.find("x" * 10_000) is None
    assert main([str(file), "alice"]) == 2 and "already" in capsys.readouterr().err
    assert main([str(file), "a b"]) == 2


def test_keys_are_random_and_long():
    made = {new_secret() for _ in range(100)}
    assert len(made) == 100 and min(map(len, made)) >= 46


def test_every_key_is_compared_whichever_fits(monkeypatch):
    """Neither the place of a key nor how much of it is right shows in what is computed."""
    seen = []
    real = hmac.compare_digest
    monkeypatch.setattr(module.hmac, "compare_digest", lambda a, b: seen.append(a) or real(a, b))
    ring = KeyRing.of([f"sk-{i}-0123456789abcdef" for i in range(5)])
    for secret in ("sk-0-0123456789abcdef", "sk-4-0123456789abcdef", "sk-9-0123456789abcdef", "nothing"):
        seen.clear()
        ring.find(secret)
        assert len(seen) == 5


@pytest.mark.parametrize(
    "text",
    [
        "alice",
        "alice user abc",
        "alice king sha256:" + "0" * 64,
        "../x user sha256:" + "0" * 64,
        "a user sha256:" + "G" * 64,
    ],
)
def test_a_wrong_line_is_told_by_number_and_not_shown(tmp_path, text):
    file = tmp_path / "keys"
    file.write_text(f"# fine\n\n{text}\n")
    with pytest.raises(ValueError, match="line 3") as caught:
        KeyRing.of(file=str(file))
    assert text not in str(caught.value)


def test_names_and_keys_are_unique(tmp_path):
    file = tmp_path / "keys"
    file.write_text(file_line("a", Role.USER, USER) + "\n" + file_line("a", Role.USER, ADMIN) + "\n")
    with pytest.raises(ValueError, match="called 'a'"):
        KeyRing.of(file=str(file))
    with pytest.raises(ValueError, match="twice"):
        KeyRing.of([USER], [USER])


@pytest.mark.parametrize("secret", ["", "with a blank in it, too", "ünicode-ünicode-ünicode", "line\nbreak-0123456789"])
def test_keys_that_no_header_carries_are_refused_without_being_shown(secret):
    with pytest.raises(ValueError, match="printable ASCII") as caught:
        KeyRing.of([secret])
    assert not secret or secret not in str(caught.value)


def test_short_keys_are_taken_and_known_to_be_weak():
    ring = KeyRing.of(["short", USER], ["tiny"])
    assert ring.find("short") == Caller("key-1", Role.USER) and ring.weak == ("key-1", "admin-1")


def test_roles():
    assert Role.ADMIN.allows(Role.USER) and Role.PROXY.allows(Role.USER) and not Role.USER.allows(Role.PROXY)
    assert not Role.PROXY.allows(Role.ADMIN)
    may = {role: [needed.value for needed in Role if role.allows(needed)] for role in Role}
    assert may[Role.USER] == ["user"] and may[Role.MONITOR] == ["monitor"]
    assert may[Role.PROXY] == ["user", "monitor", "proxy"] and may[Role.ADMIN] == ["user", "monitor", "proxy", "admin"]


def test_access_says_who_and_refuses_the_rest():
    access = Access(KeyRing.of([USER], [ADMIN]))
    assert access.check(f"Bearer {USER}") == Caller("key-1", Role.USER, "key-1")
    assert access.check(f"bearer  {ADMIN} ") == Caller("admin-1", Role.ADMIN, "admin-1")
    for given in (None, "", "Bearer", "Bearer ", USER, f"Basic {USER}", f"Bearer {USER}x", f"Bearer {USER} {ADMIN}"):
        with pytest.raises(RequestError) as caught:
            access.check(given)
        assert caught.value.kind is ErrorKind.UNAUTHENTICATED and USER not in caught.value.message
    assert Access().check(None) is None


def test_control_needs_an_admin_and_is_closed_without():
    for access, caller in (
        (Access(), None),
        (Access(KeyRing.of([USER])), Caller("key-1", Role.USER)),
        (Access(KeyRing.of([USER], [ADMIN])), Caller("key-1", Role.USER)),
        (Access(KeyRing.of([USER], [ADMIN])), None),
    ):
        with pytest.raises(RequestError) as caught:
            access.check_control(caller)
        assert caught.value.kind is ErrorKind.PERMISSION_DENIED
    Access(KeyRing.of([USER], [ADMIN])).check_control(Caller("admin-1", Role.ADMIN))


def test_figures_need_a_key_that_watches_where_there_are_keys():
    Access().check_figures(None)
    access = Access(KeyRing.of([USER], [ADMIN], monitors=[WATCH]))
    for secret in (ADMIN, WATCH):
        access.check_figures(access.check(f"Bearer {secret}"))
    watcher = access.check(f"Bearer {WATCH}")
    assert watcher == Caller("monitor-1", Role.MONITOR, "monitor-1")
    for refused in (
        lambda: access.check_figures(access.check(f"Bearer {USER}")),
        lambda: access.check_control(watcher),
        watcher.check_requests,
    ):
        with pytest.raises(RequestError) as caught:
            refused()
        assert caught.value.kind is ErrorKind.PERMISSION_DENIED
    Caller("gw", Role.PROXY).check_requests()


def test_cached_pages_are_shared_within_a_key_alone():
    alice, bob = Caller("alice", Role.USER, "alice"), Caller("bob", Role.USER, "bob")
    assert alice.cache_salt(None) == alice.cache_salt("") != bob.cache_salt(None)
    assert alice.cache_salt("x") != alice.cache_salt(None) and len(alice.cache_salt("x" * 256)) == 32
    # Scope and salt cannot be shifted against each other: names have no colon.
    assert Caller("a", Role.USER, "a").cache_salt("b:c") != Caller("a.b", Role.USER, "a.b").cache_salt("c")
    assert Caller("open", Role.USER).cache_salt("x") == "x"
    shared = Access(KeyRing.of([USER]), share_prefix_cache=True).check(f"Bearer {USER}")
    assert shared is not None and shared.cache_scope is None


def test_only_proxies_and_admins_name_tenants():
    assert Caller("u", Role.USER).tenant("other") == "u"
    assert Caller("u", Role.USER).share("other") == "u"
    assert Caller("gw", Role.PROXY).share("other") == "other" and Caller("gw", Role.PROXY).share(None) is None
    assert Caller("gw", Role.PROXY).tenant("other") == "other" and Caller("gw", Role.PROXY).tenant(None) == "gw"


def test_rates_fill_evenly():
    meter = RateMeter(60)
    for _ in range(60):
        meter.take("a", now=0.0)
    with pytest.raises(RequestError) as caught:
        meter.take("a", now=0.0)
    assert caught.value.kind is ErrorKind.RESOURCE_EXHAUSTED and caught.value.retry_after_s == pytest.approx(1.0)
    meter.take("b", now=0.0)
    meter.take("a", now=1.0)
    with pytest.raises(RequestError):
        meter.take("a", now=1.5)
    for _ in range(60):
        meter.take("a", now=1000.0)
    with pytest.raises(RequestError):
        meter.take("a", now=1000.0)


def test_many_completions_at_once_are_paid_back():
    meter = RateMeter(10)
    meter.take("a", 30, now=0.0)
    with pytest.raises(RequestError) as caught:
        meter.take("a", now=0.0)
    assert caught.value.retry_after_s == pytest.approx(21 * 6)
    RateMeter(None).take("a", 10**9)
