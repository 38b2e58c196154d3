"""The endpoints, one in each file."""
