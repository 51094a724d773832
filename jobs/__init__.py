"""Job files: lists of verbs, run here or on a cluster."""
