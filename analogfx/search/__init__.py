"""Which layers hurt, and what to do about them."""
