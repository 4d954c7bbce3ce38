"""Kinds of modules whose own code does not show their products, one file for each decision."""
