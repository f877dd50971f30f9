"""C++ of attention among all of a row. A package, so that a wheel carries it."""
