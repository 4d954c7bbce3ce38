"""Ways in from other toolkits, and back out."""
