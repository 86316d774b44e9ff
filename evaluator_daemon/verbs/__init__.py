"""One module for each verb of `evaluator-daemon`; each imports what it needs when it runs."""
