"""What the recipes run. The library imports nothing of it."""
