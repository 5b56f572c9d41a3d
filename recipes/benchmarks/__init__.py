"""Scripts that measure what docs/benchmarks.md and docs/coverage.md say."""
