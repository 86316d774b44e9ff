"""What both daemons agree on: files, processes, locks, logs. Knows neither daemon, imports nothing heavy."""
