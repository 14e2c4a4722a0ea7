"""The composition methods, one file each. Each folder is a family; its docstring says what its files define."""
