"""`mole study`: many commands from one recipe, and one report on them."""
