"""Tables and progress: what a run's record looks like to a person. Reads results, runs nothing."""
