"""Search spaces as data: what may be drawn, what follows from it, and which combinations are unsafe and why."""
