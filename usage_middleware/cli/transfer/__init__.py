"""The commands that move tokens between stores, and what they share."""
