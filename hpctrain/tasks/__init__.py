"""Ready tasks, each of which a user may copy and change."""
