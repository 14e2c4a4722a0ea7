"""Files and names: compositions, output folders, where a base comes from, concepts, pictures."""
