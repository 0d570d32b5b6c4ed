"""What the service remembers: events, feedback, catalogue changes, keys, audits; on SQLite or PostgreSQL."""

from vouch.service.storage.store import Appended, CatalogChange, Erased, KeyRow, Store, Unavailable

__all__ = ["Appended", "CatalogChange", "Erased", "KeyRow", "Store", "Unavailable"]
