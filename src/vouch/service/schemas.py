"""What may be asked over HTTP and what is answered: the contract of `/v1`.

Requests are strict: unknown fields, wrong types and anything beyond the bounds below are refused with 422. Ids are text,
as in the log they came from; a number in the log is sent as its digits.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

MAX_ID = 256
MAX_TEXT = 2_000
MAX_LABEL = 64
MAX_HISTORY = 1_000
MAX_K = 1_000
MAX_EXCLUDE = 1_000
MAX_FILTERS = 16
MAX_CHOICES = 256
MAX_EVENTS = 1_000
MAX_ITEMS = 500
MAX_ATTRIBUTES = 64
MAX_REASONS = 20
MAX_REASONED = 20
"""Recommendations of one answer, from the first, that get reasons."""
LATEST_TIME = 253_402_300_799
"""The last second of the year 9999."""

NO_CONTROLS = r"^[^\x00-\x1f\x7f]+$"

Id = Annotated[str, StringConstraints(min_length=1, max_length=MAX_ID, pattern=NO_CONTROLS)]
Label = Annotated[str, StringConstraints(min_length=1, max_length=MAX_LABEL, pattern=NO_CONTROLS)]
Text = Annotated[str, StringConstraints(max_length=MAX_TEXT, pattern=r"^[^\x00]*$")]
Number = Annotated[float, Field(allow_inf_nan=False, ge=-1e300, le=1e300)]
Whole = Annotated[int, Field(ge=-(1 << 53), le=1 << 53)]
Scalar = Annotated[bool | Whole | Number | Text, Field(union_mode="left_to_right")]
Attribute = Scalar | Annotated[list[Text], Field(max_length=MAX_CHOICES)] | None
Role = Literal["read", "write", "admin"]
Slot = Literal["attack", "privacy", "explanation"]
FeedbackKind = Literal["like", "dislike"]


class Asked(BaseModel):
    """Base of what is sent: strict, without unknown fields."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, populate_by_name=True)


class Answered(BaseModel):
    """Base of what is answered."""

    model_config = ConfigDict(frozen=True)


# Recommendations ----------------------------------------------------------------------------------------------------


class Filter(Asked):
    """A condition on one attribute of an item. All conditions given must hold; a missing attribute fulfils none.

    On an attribute that is a list of labels, `equals` and `in` ask whether any of its labels fits.
    """

    attribute: Label = Field(examples=["price"])
    equals: Scalar | None = Field(None, description="The attribute is this.", examples=["shoes"])
    in_: Annotated[list[Scalar], Field(min_length=1, max_length=MAX_CHOICES)] | None = Field(
        None, alias="in", description="The attribute is one of these.", examples=[["shoes", "boots"]]
    )
    min: Number | None = Field(None, description="The attribute is a number of at least this.", examples=[10.0])
    max: Number | None = Field(None, description="The attribute is a number of at most this.", examples=[80.0])

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.equals is None and self.in_ is None and self.min is None and self.max is None:
            raise ValueError("a filter needs at least one of equals, in, min, max")
        return self


class Whose(Asked):
    """Whom it is for: a user, a bare history, or both (then the history replaces the stored one)."""

    user: Id | None = Field(None, description="A user id of the log or of events.", examples=["u17"])
    history: Annotated[list[Id], Field(max_length=MAX_HISTORY)] | None = Field(
        None, description="Item ids, oldest first. Items that are not known are left out and named.", examples=[["a"]]
    )

    @model_validator(mode="after")
    def _names_someone(self) -> Self:
        if self.user is None and self.history is None:
            raise ValueError("give a user or a history (which may be empty)")
        return self


class RecommendRequest(Whose):
    """Ask for the best items for a user or a history."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"user": "u17", "k": 5},
                {"history": ["sku-3", "sku-8"], "k": 5, "filters": [{"attribute": "price", "max": 80}]},
            ]
        }
    )

    k: int = Field(10, ge=1, le=MAX_K, description="How many items.")
    filters: Annotated[list[Filter], Field(max_length=MAX_FILTERS)] = Field(default=[])
    exclude: Annotated[list[Id], Field(max_length=MAX_EXCLUDE)] = Field(
        default=[], description="Items never to recommend."
    )
    repeat: bool = Field(False, description="Items of the history may be recommended again.")
    scenario: Label | None = None
    domain: Label | None = None
    reasons: int = Field(
        0, ge=0, le=5, description="History items to name as the reason of each of the first 20 recommendations."
    )


class Item(Answered):
    """What is known of an item."""

    item: str
    title: str
    attributes: dict[str, Any] = {}
    picture: str | None = Field(None, description="Where the service shows its picture.")
    deleted: bool = False
    recommendable: bool = Field(True, description="False for items that were added after the model was trained.")


class Reason(Answered):
    """A history item that a recommendation rests on."""

    item: str
    title: str
    drop: float = Field(description="How far the standing falls without it, in standard deviations of all scores.")


class Recommendation(Answered):
    """One recommended item."""

    item: str
    score: float
    title: str
    attributes: dict[str, Any] = {}
    picture: str | None = None
    reasons: list[Reason] = []


class ModelInfo(Answered):
    """Which model answered."""

    name: str
    fingerprint: str


class RecommendAnswer(Answered):
    """Items, best first."""

    recommendations: list[Recommendation]
    fallback: bool = Field(description="True where there was no usable history and popular items are given.")
    unknown: list[str] = Field([], description="History items that the model does not know; they were left out.")
    notes: list[str] = Field([], description="What else the asker should know.")
    model: ModelInfo


class SimilarRequest(Asked):
    """Ask for items like an item."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"item": "sku-3", "k": 5}]})

    item: Id
    k: int = Field(10, ge=1, le=MAX_K)
    filters: Annotated[list[Filter], Field(max_length=MAX_FILTERS)] = Field(default=[])


class SimilarAnswer(Answered):
    """Similar items, most similar first."""

    item: Item
    similar: list[Recommendation]
    model: ModelInfo


class ExplainRequest(Whose):
    """Ask which history items the recommendation of an item rests on."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"user": "u17", "item": "sku-9"}]})

    item: Id
    n: int = Field(3, ge=1, le=MAX_REASONS, description="How many reasons.")


class ExplainAnswer(Answered):
    """The reasons of a recommendation, strongest first."""

    item: Item
    reasons: list[Reason]
    evidence: dict[str, Any] | None = Field(None, description="What the method itself offers as evidence, if anything.")
    unknown: list[str] = []
    notes: list[str] = []
    model: ModelInfo


# Events -------------------------------------------------------------------------------------------------------------


class Event(Asked):
    """One interaction. The `id` makes sending it again harmless: the first one counts."""

    id: Id = Field(description="Chosen by the sender, unique for ever (a UUID, say).", examples=["0f8fad5b-d9cb"])
    user: Id = Field(examples=["u17"])
    item: Id = Field(examples=["sku-3"])
    time: int | None = Field(None, ge=0, le=LATEST_TIME, description="Seconds since 1970 UTC. Now, if not given.")
    kind: Label = Field("view", examples=["view", "buy"])
    value: Number | None = Field(None, description="A rating or a weight.")
    scenario: Label | None = None
    domain: Label | None = None


class EventsRequest(Asked):
    """Append interactions; they count from the moment of the answer, in the order given."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"events": [{"id": "e-1", "user": "u17", "item": "sku-3", "kind": "buy"}]}]}
    )

    events: Annotated[list[Event], Field(min_length=1, max_length=MAX_EVENTS)]


class EventsAnswer(Answered):
    """What was stored, durably, before this answer was sent."""

    accepted: int = Field(description="Events stored now.")
    duplicates: int = Field(description="Events whose id was known already: nothing was changed.")
    unknown: list[str] = Field([], description="Items that the model does not know: stored, but of no effect yet.")


class HistoryRequest(Asked):
    """Ask for the history of a user."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"user": "u17"}]})

    user: Id
    limit: int = Field(50, ge=1, le=MAX_HISTORY)


class HistoryAnswer(Answered):
    """The latest items of a user, oldest first: those of the log, then those of events."""

    known: bool = Field(description="Whether the user is in the log or has events.")
    items: list[Item]
    hidden: list[str] = Field([], description="Items the user disliked: they are not recommended to them.")


class EraseRequest(Asked):
    """Forget what the service stored of a user (events, feedback). The training log stays as it is."""

    user: Id


class EraseAnswer(Answered):
    """How many rows were erased."""

    events: int
    feedback: int


class FeedbackRequest(Asked):
    """What a user thinks of a recommendation. A like counts as an interaction; a dislike hides the item from them."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"id": "f-1", "user": "u17", "item": "s", "kind": "like"}]}
    )

    id: Id
    user: Id
    item: Id
    kind: FeedbackKind


class FeedbackAnswer(Answered):
    """Whether it was new."""

    accepted: bool


# Catalogue ----------------------------------------------------------------------------------------------------------


class ItemUpsert(Asked):
    """An item's new title and attributes; what is not named keeps its value, null takes an attribute away."""

    id: Id = Field(examples=["sku-3"])
    title: Text | None = None
    attributes: Annotated[dict[Label, Attribute], Field(max_length=MAX_ATTRIBUTES)] = Field(
        default={}, examples=[{"price": 59.9, "category": "shoes"}]
    )


class ItemsRequest(Asked):
    """Add or change items. A deleted item comes back by this."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"items": [{"id": "sku-3", "attributes": {"price": 5}}]}]}
    )

    items: Annotated[list[ItemUpsert], Field(min_length=1, max_length=MAX_ITEMS)]


class ItemsAnswer(Answered):
    """What was stored."""

    stored: int
    not_recommendable: list[str] = Field(
        [],
        description="Items the model was not trained on: kept in the catalogue, recommended after the next training.",
    )


class DeleteAnswer(Answered):
    """Whether the item was there."""

    deleted: bool


# Running the service ------------------------------------------------------------------------------------------------


class CardAnswer(Answered):
    """The run card: what model this is, on what data, how good, what is claimed and what not."""

    card: dict[str, Any]
    audits: dict[str, Any] = Field({}, description="Results of the attack, privacy and explanation audits, if any.")


class AuditRequest(Asked):
    """The result of an audit, shown in the run card."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"summary": "no attack found", "result": {"auc": 0.5}}]})

    summary: Text
    result: Annotated[dict[Label, Any], Field(max_length=256)] = Field(default={})


class SwapRequest(Asked):
    """Serve another run, without dropping a request."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"run": "best-2026-11"}]})

    run: Annotated[
        str, StringConstraints(min_length=1, max_length=MAX_ID, pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$")
    ] = Field(description="Name of a run folder beside the one that is served.")


class SwapAnswer(Answered):
    """The model served from now on."""

    model: ModelInfo
    previous: ModelInfo


class KeyRequest(Asked):
    """Make an API key."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"name": "shop frontend", "role": "read"}]})

    name: Label
    role: Role


class KeyInfo(Answered):
    """A key, without its secret."""

    id: str
    name: str
    role: Role
    created: int


class KeyAnswer(KeyInfo):
    """A new key with its secret, which is shown this once."""

    key: str


class KeysAnswer(Answered):
    """The keys in use."""

    keys: list[KeyInfo]


class Problem(Answered):
    """What is wrong, where, and what to do."""

    what: str
    where: str | None = None
    hint: str | None = None


class ErrorAnswer(Answered):
    """Every answer with a status of 400 or above."""

    error: Problem
