"""Model cards, curves, and pushes to the Hub."""
