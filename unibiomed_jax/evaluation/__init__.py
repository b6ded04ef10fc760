"""How good a model is, measured on data it was not trained on."""
