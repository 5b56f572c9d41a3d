"""Choose widths: budgets, scores, the greedy descent, the baselines, and their results."""
