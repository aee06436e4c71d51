"""Models that solve problems: evaluation under interventions, block scores, probes, heads transplanted."""
