"""Where tokens are kept. Each store is a room of its own; what they share is :mod:`.base`."""
