"""Models that solve word problems: evaluation under interventions, block scores, probes, head transplants."""
