"""Families of models: hyperparameters, tensors, and what configs of others mean."""
