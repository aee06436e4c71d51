"""Effects of patching estimated from gradients: nodes (AtP), edges (EAP), inputs, and estimates that screen a sweep."""
