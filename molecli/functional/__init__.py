"""The mathematics, as functions of tensors, with the symbols of the papers."""
