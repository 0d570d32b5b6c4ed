// What the pages add where there is JavaScript; all of them work without it.
"use strict";

// When the element that had the focus was replaced, go on at the heading of what replaced it.
document.addEventListener("htmx:afterSettle", () => {
  document.getElementById("problem").replaceChildren();
  if (document.activeElement === null || document.activeElement === document.body) {
    document.getElementById("board-title")?.focus({ preventScroll: true });
  }
});

// A service that cannot be reached says so, too.
document.addEventListener("htmx:sendError", () => {
  const notice = document.createElement("p");
  notice.className = "problem";
  notice.textContent = "The service cannot be reached. Try again in a moment.";
  document.getElementById("problem").replaceChildren(notice);
});
