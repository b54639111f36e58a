"""Small integers with one scale per block, and a decoder computed on them: format, products, tables, norms, cache."""
