"""KV events: an engine's page events for others, in the shapes that vLLM's subscribers read, over ZeroMQ. Our own stream of them is
Control.WatchPages (serving/frontends/grpc)."""
