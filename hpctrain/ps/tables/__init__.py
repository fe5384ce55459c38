"""Embedding tables on servers: a worker's end, and a server's."""
