"""One engine in several processes: the first schedules and serves, the others carry out the same commands."""
