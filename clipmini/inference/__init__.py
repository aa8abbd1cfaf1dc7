"""Using a model: embed, search, classify, serve."""
