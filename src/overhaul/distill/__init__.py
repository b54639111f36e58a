"""Methods that train a model to predict what another one predicts."""
