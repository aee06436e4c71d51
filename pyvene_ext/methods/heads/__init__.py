"""What heads attend to, write and copy: patterns, scores, name movers, translation heads, the logit lens, information flow."""
