"""Training, of a client in a round and of a learner on an experience alike."""
