"""Tuning what stays after pruning. One file a method; the file name is its name in recipes."""
