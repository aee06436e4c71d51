"""Where reasoning happens in models that solve word problems: block scores, forced attention, noise, probes, head transplants."""
