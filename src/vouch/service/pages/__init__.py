"""The pages: a shop window, comparisons, claims and the run card, rendered here and whole without JavaScript."""

from vouch.service.pages.routes import router
from vouch.service.pages.web import problem_page

__all__ = ["problem_page", "router"]
