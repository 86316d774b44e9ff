"""Pictures and figures of a study, made from its files in a process of their own."""
