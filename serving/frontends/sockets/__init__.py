"""What HTTP and gRPC share below their protocols."""
