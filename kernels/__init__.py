"""The arithmetic of one analog product, on tensors and scalars: torch reference and Triton."""

# Keep this file without code. With the repository root on sys.path, transformers takes this folder
# for the package of the same name that it supports, and an import in here breaks its own.
