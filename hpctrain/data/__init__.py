"""Samples: the shard format, importers, the epoch order, and the loader."""
