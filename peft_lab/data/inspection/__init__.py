"""Looks at somebody's data: what stands in the files, which task it may be, and what is wrong with it."""
