// What the pages add where there is JavaScript; all of them work without it.
"use strict";

// When the element that had the focus was replaced, go on at the heading of what replaced it.
document.addEventListener("htmx:afterSettle", () => {
  if (document.activeElement === null || document.activeElement === document.body) {
    document.getElementById("board-title")?.focus({ preventScroll: true });
  }
});

// What unfolded in a card folds up again, and the focus goes back to where it came from.
document.addEventListener("click", (event) => {
  const slot = event.target.closest("[data-close]")?.parentElement;
  if (!slot) return;
  slot.closest(".card").querySelector(".because a").focus();
  slot.replaceChildren();
});

// What went wrong is told until something goes well.
document.addEventListener("htmx:afterRequest", (event) => {
  if (event.detail.successful) document.getElementById("problem").replaceChildren();
});

// A service that cannot be reached says so, too.
document.addEventListener("htmx:sendError", () => {
  const notice = document.createElement("p");
  notice.className = "problem";
  notice.textContent = "The service cannot be reached. Try again in a moment.";
  document.getElementById("problem").replaceChildren(notice);
});
