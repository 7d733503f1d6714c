"""Learning a stream of tasks: one session over cluster, base, data, training, evaluation and registry; all of it resumable."""
