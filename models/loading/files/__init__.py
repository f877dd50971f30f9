"""Files of weights as they are on disk: tensors by one name, whatever tool wrote them."""
