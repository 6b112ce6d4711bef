"""The embedded world: its factors and captions, its judge, and the small models that ship with the package."""
