"""Tensors in, tensors out: the mathematics, with the papers' symbols."""
