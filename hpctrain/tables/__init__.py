"""Embedding tables of rows that are made when they are first seen, and kept by their servers."""
