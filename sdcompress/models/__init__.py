"""Where models come from, and the ones that ship."""
