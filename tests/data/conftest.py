"""Fixtures of remote files, for all tests of data."""

from remote_files import cache, storage

__all__ = ("cache", "storage")
