"""Scores from recorded values, and how sure a comparison of them is. Pure; the only part of shared with numpy."""
