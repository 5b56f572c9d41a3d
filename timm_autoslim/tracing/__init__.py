"""From a model to its channel graph: which channels live and die together, and why some must stay."""
