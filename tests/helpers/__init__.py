"""What tests share and is no test: models, specs, comparisons, and ways to run things."""
