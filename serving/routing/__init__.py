"""Which of several engines gets a request: by what each has probably cached, by load, by turns. Plain Python, so that gateways and
the simulator decide with the same code."""
