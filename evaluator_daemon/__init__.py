"""Watches a study folder, renders and scores every checkpoint as it lands."""
