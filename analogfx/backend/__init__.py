"""``torch.compile(model, backend="analogfx")``.

Importing this package imports nothing: torch finds :func:`analogfx.backend.compiler.backend` by
the name "analogfx", and Dynamo is imported when a model is compiled.
"""
