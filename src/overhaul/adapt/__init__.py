"""Methods that train a model, or a small part of it."""
