"""Modules that run rewritten graphs: captured, planned, swapped and followed."""
