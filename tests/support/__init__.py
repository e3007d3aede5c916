"""Shared by the tests: tiny models, tiny runs, property helpers, a stand-in for the Hub."""
