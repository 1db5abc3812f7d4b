"""Read manifests of each format: a file that lists speech, or holds it -> a Record for each line, sample or row."""
