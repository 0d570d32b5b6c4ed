"""Executable claims: a paper's statement as method against baseline, over several seeds, with a verdict."""

from vouch.claims.claim import Claim, Measurement, claim, claims
from vouch.claims.ledger import LedgerEntry, read_ledger
from vouch.claims.runner import run_claim

__all__ = ["Claim", "LedgerEntry", "Measurement", "claim", "claims", "read_ledger", "run_claim"]
