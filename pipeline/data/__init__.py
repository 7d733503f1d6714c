"""What a task's rows are, from files to batches; data flows sources -> rows -> encoded -> loading."""
