"""Runs any training program for the command trainer and brings its weight files under the names of the contract."""
