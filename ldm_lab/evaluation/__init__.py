"""Evaluation: how good what a model makes is, measured without a person looking."""
