"""What is answered here: an endpoint in a file."""
