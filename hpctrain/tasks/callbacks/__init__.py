"""What users have done at the events of a run: the base class, and ready ones by name."""
