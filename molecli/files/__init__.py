"""Files and names: compositions, output folders, sources of bases, concepts, pictures."""
