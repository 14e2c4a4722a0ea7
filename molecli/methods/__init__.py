"""The composition methods, one file each; a folder is a family, and says what a file defines (`catalog.methods`)."""
