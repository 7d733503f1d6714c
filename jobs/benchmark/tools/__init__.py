"""What benchmarks are made of: models, corpora, and the ways that are compared."""
