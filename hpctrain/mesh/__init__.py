"""Models larger than a rank: what of one each rank of a mesh holds, and how it is computed."""
