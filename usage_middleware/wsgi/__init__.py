"""HTTP: the middleware, the endpoint, and what they share. Knows no concrete store."""
