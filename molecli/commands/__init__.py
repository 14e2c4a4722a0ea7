"""The commands: one file each, from a recipe to the files it writes. `domain` says which kind of base one runs on."""
