"""Subcommands that show a table, one a file, and what they share."""
