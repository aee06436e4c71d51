"""Word problems solved with interventions in place: texts written greedily, answers read by rules, results kept for resuming."""
