"""Effects of patching estimated from gradients: nodes (AtP), edges (EAP), circuits, inputs, and estimates that screen a sweep."""
