"""scripts/streams.py with a few dozen streams: all run, and all are given back."""

from __future__ import annotations

import json

from scripts import streams


def test_every_stream_runs_and_is_given_back(capsys):
    assert streams.main(["--streams", "40", "--step-s", "0.5", "--slow", "0.5"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["live_in_engine"] == 40
