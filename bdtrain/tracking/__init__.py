"""Where numbers go: the metrics file, the console, and every name with its unit."""
