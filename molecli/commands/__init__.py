"""One flow a command, from a recipe to what it writes; `domain` says which kind of base it runs on."""
