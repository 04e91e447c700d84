"""One component against its peer."""
