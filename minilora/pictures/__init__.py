"""Pictures of runs and of lessons, in one style."""
