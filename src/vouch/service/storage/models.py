"""The tables. A change here needs a migration; a test compares the two."""

from __future__ import annotations

from typing import Any

from sqlalchemy import JSON, BigInteger, Boolean, Float, Index, Integer, Text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

Sequence = BigInteger().with_variant(Integer, "sqlite")  # only INTEGER PRIMARY KEY counts up by itself there


class Base(DeclarativeBase):
    """Base of the tables; times are whole seconds since 1970 UTC."""


class EventRow(Base):
    """One interaction. Histories follow `seq`, the order of arrival, which no clock can disturb."""

    __tablename__ = "events"
    __table_args__ = (Index("events_of_user", "user_id", "seq"),)

    seq: Mapped[int] = mapped_column(Sequence, primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(Text, unique=True)
    user_id: Mapped[str] = mapped_column(Text)
    item_id: Mapped[str] = mapped_column(Text)
    kind: Mapped[str] = mapped_column(Text)
    time: Mapped[int] = mapped_column(BigInteger)
    value: Mapped[float | None] = mapped_column(Float(53))
    scenario: Mapped[str | None] = mapped_column(Text)
    domain: Mapped[str | None] = mapped_column(Text)


class FeedbackRow(Base):
    """What a user thinks of an item; of one user and item the latest row counts."""

    __tablename__ = "feedback"
    __table_args__ = (Index("feedback_of_user", "user_id", "seq"),)

    seq: Mapped[int] = mapped_column(Sequence, primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(Text, unique=True)
    user_id: Mapped[str] = mapped_column(Text)
    item_id: Mapped[str] = mapped_column(Text)
    kind: Mapped[str] = mapped_column(Text)
    time: Mapped[int] = mapped_column(BigInteger)


class ItemRow(Base):
    """A change to the run's catalogue: what is given here replaces it, a null attribute takes one away."""

    __tablename__ = "items"
    __table_args__ = (Index("items_version", "version"),)

    id: Mapped[str] = mapped_column(Text, primary_key=True)
    title: Mapped[str | None] = mapped_column(Text)
    attributes: Mapped[dict[str, Any]] = mapped_column(JSON)
    deleted: Mapped[bool] = mapped_column(Boolean)
    version: Mapped[int] = mapped_column(BigInteger)


class KeyTable(Base):
    """An API key: the hash of its secret, never the secret."""

    __tablename__ = "keys"

    id: Mapped[str] = mapped_column(Text, primary_key=True)
    name: Mapped[str] = mapped_column(Text)
    role: Mapped[str] = mapped_column(Text)
    hash: Mapped[str] = mapped_column(Text)
    created: Mapped[int] = mapped_column(BigInteger)


class AuditRow(Base):
    """The latest result of one kind of audit of one model."""

    __tablename__ = "audits"

    fingerprint: Mapped[str] = mapped_column(Text, primary_key=True)
    slot: Mapped[str] = mapped_column(Text, primary_key=True)
    summary: Mapped[str] = mapped_column(Text)
    result: Mapped[dict[str, Any]] = mapped_column(JSON)
    time: Mapped[int] = mapped_column(BigInteger)


class SettingRow(Base):
    """Small shared facts: the catalogue's version, the run that is served."""

    __tablename__ = "settings"

    name: Mapped[str] = mapped_column(Text, primary_key=True)
    value: Mapped[Any] = mapped_column(JSON)
