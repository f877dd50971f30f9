"""A Hypothesis state machine drives scheduler and page pool through arrivals, steps, aborts and deadlines."""

from __future__ import annotations

import dataclasses

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from serving.engine.api.sampling_params import SamplingParams
from serving.engine.api.types import EngineRequest
from tests.serving.engine import fake_runner as fake
from tests.serving.engine.scheduling.test_scheduler import CONFIG, Driver


class SchedulerMachine(RuleBasedStateMachine):
    """Every step checks the invariants (Driver.check); the end drains and compares every token with the true one."""

    @initialize(
        pages=st.sampled_from([14, 24, 60]),
        budget=st.sampled_from([20, 64]),
        policy=st.sampled_from(["fcfs", "priority"]),
        prefix=st.booleans(),
        host_pages=st.sampled_from([0, 2, 50]),
        fair=st.booleans(),
        steps=st.sampled_from([1, 1, 5]),
        asynchronous=st.booleans(),
    )
    def start(self, pages, budget, policy, prefix, host_pages, fair, steps, asynchronous):
        config = dataclasses.replace(
            CONFIG,
            num_pages=pages,
            max_num_batched_tokens=budget,
            policy=policy,
            enable_prefix_caching=prefix,
            host_pages=host_pages if prefix else 0,
            fair_share=fair,
            num_scheduler_steps=steps,
        )
        self.driver = Driver(config, asynchronous)
        self.now = 0.0
        self.count = 0

    @rule(
        stem=st.integers(0, 2),
        shared=st.integers(0, 60),
        own=st.integers(1, 20),
        max_tokens=st.integers(1, 30),
        stop_at=st.one_of(st.none(), st.integers(0, 5)),
        priority=st.integers(0, 2),
        tenant=st.sampled_from(["a", "b"]),
        patience=st.one_of(st.none(), st.integers(1, 30)),
    )
    def add(self, stem, shared, own, max_tokens, stop_at, priority, tenant, patience):
        self.count += 1
        prompt = [(stem * 7 + i) % 50 for i in range(shared)] + [60 + (self.count + i) % 40 for i in range(own)]
        stop = () if stop_at is None else (fake.expected(prompt, 6)[stop_at],)
        self.driver.add(
            EngineRequest(
                f"r{self.count}",
                tuple(prompt),
                SamplingParams(temperature=0, max_tokens=max_tokens),
                eos_token_ids=stop,
                priority=priority,
                tenant=tenant,
                arrival_time=self.now,
                deadline=None if patience is None else self.now + patience,
            )
        )

    @rule(steps=st.integers(1, 8))
    def step(self, steps):
        for _ in range(steps):
            self.now += 1
            self.driver.step(self.now)

    @precondition(lambda self: getattr(self, "driver", None) and self.driver.scheduler.requests)
    @rule(which=st.integers(0, 1000))
    def abort(self, which):
        live = sorted(self.driver.scheduler.requests)
        self.driver.abort(live[which % len(live)])

    def teardown(self):
        if hasattr(self, "driver"):
            self.driver.drain()
            self.driver.verify()


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(
    max_examples=40, stateful_step_count=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
