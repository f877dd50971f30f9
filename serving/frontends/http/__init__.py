"""What every HTTP dialect stands on: connections, bodies, keys, failures, streams of events. It knows no dialect."""
