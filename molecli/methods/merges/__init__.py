"""Methods that make one LoRA of all, matrix by matrix: `merge`."""
