"""Artifacts: draft, manifest, publication, lock, object store. No module here knows a kind of artifact."""
