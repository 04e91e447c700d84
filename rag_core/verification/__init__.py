"""`rag verify`, repair, and checks before a run. These modules know every kind of artifact."""
