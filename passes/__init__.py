"""Rewrites of FX graphs in the analog dialect, one rule a file."""

# Keep this file without code: with the repository root on sys.path, this folder is importable under
# its bare name, outside the package that its modules belong to.
