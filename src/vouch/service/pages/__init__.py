"""The pages: a shop window, comparisons, claims and the run card, rendered here and whole without JavaScript."""

from vouch.service.pages.routes import router

__all__ = ["router"]
