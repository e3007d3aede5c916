"""Comparing methods: many runs under one budget, their results, statistics and report."""
