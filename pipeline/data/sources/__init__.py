"""Where rows come from: local or remote files of several formats, presets of published benchmarks, the built-in demo."""
