"""Taking data out of a model again: which sequences are trained for it, and which of them a deletion leaves."""
