"""What the documentation says that nobody types: tables from records, lists and pages from cards, keys and commands."""
