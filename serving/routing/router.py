"""Where a request goes: sessions first, then the policy, with the decision explained and counted."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Sequence

from serving.engine.api.types import EngineRequest
from serving.routing.policies import POLICIES, Balance, Policy
from serving.routing.prefixes import (
    DEFAULT_BLOCK_TOKENS,
    MAX_BLOCKS,
    Holders,
    Prefixes,
    RememberedPrefixes,
    chain,
    extended,
)
from serving.routing.targets import Target, load_of

MAX_SESSIONS = 100_000
NOTHING: frozenset[str] = frozenset()


@dataclasses.dataclass(frozen=True)
class Wish:
    """What a client asks of the router.

    Attributes:
        session: requests with the same one go to the same target while that is well.
        endpoints: names of targets, the first that is there gets it; whoever stands in front has decided.
        among: names of the only targets that may get it; empty: all.
    """

    session: str | None = None
    endpoints: tuple[str, ...] = ()
    among: frozenset[str] = frozenset()


NO_WISH = Wish()


class Chains:
    """A request's hashes, by block size; made when they are asked for."""

    def __init__(self, request: EngineRequest) -> None:
        self._root = (request.adapter, request.cache_salt)
        media = request.media  # an image's content stands in its places
        self._tokens = (
            request.prompt_token_ids if media is None else tuple(media.standing(request.prompt_token_ids).tolist())
        )
        self._made: dict[int, list[int]] = {}

    def of(self, block_tokens: int, completion: Sequence[int] = ()) -> list[int]:
        """Of the prompt, and of a completion behind it."""
        found = self._made.get(block_tokens)
        if found is None:
            found = self._made[block_tokens] = chain(self._root, self._tokens, block_tokens)
        return extended(found, self._root, (*self._tokens, *completion), block_tokens) if completion else found


class _Matches:
    """`Match` of one request at one router's targets."""

    def __init__(self, router: Router, chains: Chains) -> None:
        self._router = router
        self._chains = chains

    def longest(self, able: Sequence[Target]) -> tuple[int, list[Target]]:
        """See Match."""
        return self._router._longest(able, self._chains)

    def remembered(self, target: Target) -> int:
        """See Match."""
        return len(self._router.prefixes(target.name))


@dataclasses.dataclass(frozen=True)
class Route:
    """A decision.

    Attributes:
        chosen: the target that it is given to.
        able: all that could run it.
        reason: endpoint (somebody in front chose), session, prefix, load, imbalance, kv, turn, random, only (there was but one).
        matched_tokens: prompt tokens that the chosen one probably has.
        chains: the request's hashes.
        holder: the target that has the longest part of the prompt, and how many tokens; None where that is not known.
    """

    chosen: Target
    able: Sequence[Target]
    policy: str
    reason: str
    matched_tokens: int
    prompt_tokens: int
    chains: Chains
    holder: tuple[Target, int] | None = None

    @functools.cached_property
    def order(self) -> tuple[Target, ...]:
        """The chosen target, then those to try when it refuses, the least loaded first."""
        rest = (one for one in self.able if one is not self.chosen)
        return (self.chosen, *sorted(rest, key=lambda one: (one.load, one.routed)))

    def tries(self) -> Iterator[Target]:
        """`order`, of which most requests need the first alone: the others are put in order when that one has refused."""
        yield self.chosen
        yield from self.order[1:]

    def explain(self, number: int, attempt: int = 0) -> str:
        """The decision in one line, for whoever asked.

        Args:
            number: of the target that is tried: addresses are the operator's to know.
            attempt: which of `order` that is.
        """
        reason = "retry" if attempt else self.reason
        return (
            f"target={number}; policy={self.policy}; reason={reason}; matched={self.matched_tokens}/{self.prompt_tokens}; "
            f"load={(self.order[attempt] if attempt else self.chosen).load}; targets={len(self.able)}"
        )


class Router:
    """Decides for one gateway. Belongs to one event loop, or one simulation.

    Args:
        policy: a name of POLICIES.
        block_tokens: how finely prefixes are told apart; None takes each target's page size.
        max_blocks: remembered of one target, at most.
    Raises:
        ValueError: there is no such policy.

    Attributes:
        targets: by name, in the order in which they came.
        decisions: (policy, reason) -> count.
        matched_tokens, prompt_tokens: of all decisions.
        retries: requests that were tried on another target, by the reason's name.
        moved_sessions: sessions whose target was gone or overloaded.
    """

    def __init__(
        self,
        policy: str = "cache",
        balance: Balance | None = None,
        *,
        block_tokens: int | None = None,
        max_blocks: int = MAX_BLOCKS,
        max_sessions: int = MAX_SESSIONS,
        seed: int = 0,
    ) -> None:
        if policy not in POLICIES:
            raise ValueError(f"policy must be one of {', '.join(POLICIES)}, got {policy!r}.")
        self.policy_name = policy
        self.balance = balance or Balance()
        self.targets: dict[str, Target] = {}
        self.decisions: Counter[tuple[str, str]] = Counter()
        self.retries: Counter[str] = Counter()
        self.matched_tokens = self.prompt_tokens = self.moved_sessions = 0
        self._policy: Policy = POLICIES[policy](self.balance, seed)
        self._prefixes: dict[str, Prefixes] = {}
        self._holders: dict[int, Holders] = {}  # by block size
        self._bits: list[Target | None] = []  # by the number of their bit; None where one is free
        self._all = 0  # their bits
        self._block_tokens = block_tokens
        self._max_blocks = max_blocks
        self._sessions: OrderedDict[str, str] = OrderedDict()
        self._max_sessions = max_sessions

    # ---- targets ----

    def add(self, name: str, page_size: int = DEFAULT_BLOCK_TOKENS, num_pages: int = MAX_BLOCKS) -> Target:
        """Takes one more target.

        Raises:
            ValueError: there is one of that name.
        """
        if name in self.targets:
            raise ValueError(f"The target {name} is there twice.")
        block = self._block_tokens or page_size
        pages = max(1, num_pages * page_size // block)
        free = self._bits.index(None) if None in self._bits else len(self._bits)
        self.targets[name] = target = Target(name, 1 << free)
        self._bits[free : free + 1] = [target]
        self._all |= target.bit
        self.use(name, RememberedPrefixes(block, min(self._max_blocks, pages)))
        return target

    def remove(self, name: str) -> None:
        """Chooses it no more; sessions move on with their next request."""
        target, known = self.targets.pop(name, None), self._prefixes.pop(name, None)
        if target is not None and known is not None:
            known.leave()
            self._bits[target.bit.bit_length() - 1] = None
            self._all &= ~target.bit

    def forget(self, name: str) -> None:
        """It was started anew, and has lost its cache. One that tells of its pages says so itself, perhaps before this is known."""
        known = self._prefixes.get(name)
        if isinstance(known, RememberedPrefixes):
            known.clear()

    def prefixes(self, name: str) -> Prefixes:
        """What a target has."""
        return self._prefixes[name]

    def use(self, name: str, prefixes: Prefixes) -> None:
        """Knows what a target has by other means from now on (its events)."""
        before, self._prefixes[name] = self._prefixes.get(name), prefixes
        if before is not None:
            before.leave()
        if (target := self.targets.get(name)) is not None:
            prefixes.join(self._holders.setdefault(prefixes.block_tokens, Holders()), target.bit)

    # ---- requests ----

    def route(self, request: EngineRequest, healthy: Iterable[Target], wish: Wish = NO_WISH) -> Route | None:
        """Decides, and counts the decision. None where no target is healthy and can run the request.

        Call `begin` for the target that is tried, and `end` when it is over.
        """
        able = healthy if isinstance(healthy, list) else list(healthy)
        senses = request.media.senses if request.media is not None else NOTHING
        if request.adapter is not None or wish.among or senses:
            able = [
                one for one in able if one.can(request.adapter, senses) and (not wish.among or one.name in wish.among)
            ]
        if not able:
            return None
        chains = Chains(request)
        prompt = len(request.prompt_token_ids)
        chosen, reason, spared = self._wished(able, wish)
        if chosen is None:
            among = able if spared is None else [one for one in able if one is not spared]
            pick = self._policy.pick(among, prompt, _Matches(self, chains))
            chosen, reason = pick.target, "only" if len(able) == 1 else pick.reason
        if wish.session is not None:
            self._keep(wish.session, chosen.name)
        matched, holder = 0, None
        if self._policy.uses_prefixes:
            matched = self._matched(chosen, chains)
            if matched < prompt and len(able) > 1:
                tokens, having = self._longest(able, chains)
                holder = (having or able)[0], tokens
        self.decisions[self.policy_name, reason] += 1
        self.matched_tokens += matched
        self.prompt_tokens += prompt
        return Route(chosen, able, self.policy_name, reason, matched, prompt, chains, holder)

    def _matched(self, target: Target, chains: Chains) -> int:
        known = self._prefixes[target.name]
        return known.match(chains.of(known.block_tokens)) * known.block_tokens

    def _longest(self, able: Sequence[Target], chains: Chains) -> tuple[int, list[Target]]:
        """See Match.longest."""
        among = self._all if len(able) == len(self.targets) else sum(one.bit for one in able)
        most, having = 0, 0
        for block_tokens, holders in self._holders.items():
            count, who = holders.longest(chains.of(block_tokens), among)
            if count * block_tokens > most:
                most, having = count * block_tokens, who
            elif count and count * block_tokens == most:
                having |= who
        return most, list(self._of_bits(having))

    def _of_bits(self, bits: int) -> Iterator[Target]:
        while bits:
            low = bits & -bits
            target = self._bits[low.bit_length() - 1]
            assert target is not None, "who is gone has left the holders"
            yield target
            bits ^= low

    def begin(self, route: Route, target: Target) -> Visit:
        """A target of the route's is given the request."""
        target.live += 1
        target.routed += 1
        known = self._prefixes.get(target.name) if self._policy.uses_prefixes else None
        hashes = route.chains.of(known.block_tokens) if known is not None else []
        if known is not None:
            known.sent(hashes)
        return Visit(target, route.chains, known, hashes)

    def end(self, visit: Visit, completion: Sequence[int] | None) -> None:
        """A request is over at a target.

        Args:
            completion: the tokens it made, which the target's cache has too; None where the target refused it or was lost.
        """
        visit.target.live -= 1
        if visit.known is None:
            return
        whole = visit.chains.of(visit.known.block_tokens, completion) if completion is not None else []
        visit.known.ended(visit.hashes, whole)

    # ---- what there is to see ----

    @property
    def imbalance(self) -> int:
        """Requests of the busiest target beyond those of the least busy one."""
        loads = list(map(load_of, self.targets.values()))
        return max(loads) - min(loads) if loads else 0

    def _wished(self, able: Sequence[Target], wish: Wish) -> tuple[Target | None, str, Target | None]:
        """The target that is not the policy's to choose, and why; or None, and a session's target that is to be spared."""
        for name in wish.endpoints:
            target = self.targets.get(name)
            if target is not None and target in able:
                return target, "endpoint", None
        kept = self._sessions.get(wish.session) if wish.session is not None else None
        if kept is None:
            return None, "", None
        target = self.targets.get(kept)
        target = target if target in able else None
        if target is not None and self.balance.overload(target, able) is None:
            return target, "session", None
        self.moved_sessions += 1
        return None, "", target

    def _keep(self, session: str, name: str) -> None:
        self._sessions[session] = name
        self._sessions.move_to_end(session)
        if len(self._sessions) > self._max_sessions:
            self._sessions.popitem(last=False)


@dataclasses.dataclass(slots=True)
class Visit:
    """A request at a target."""

    target: Target
    chains: Chains
    known: Prefixes | None
    hashes: list[int]
