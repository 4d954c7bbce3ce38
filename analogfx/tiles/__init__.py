"""A model on the crossbars of a chip: where its weights lie, and what that costs."""
