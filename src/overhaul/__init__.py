"""Change a model you already have, instead of training it again."""
