"""C++ of products with weights in blocks. A package, so that a wheel carries it."""
