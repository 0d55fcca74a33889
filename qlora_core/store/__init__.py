"""Artifacts: immutable files with a manifest, published whole or not at all, verified on every read. Folder and S3."""
