// Keys for the blind vote: 1, 2, 0 for a tie, E to write a better answer, and N for the next round.
const [vote, again, better] = ["vote", "again", "better"].map((id) => document.getElementById(id));
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    if (event.target.id === "edited") vote.querySelector("button").focus();
    else if (again?.contains(event.target)) again.requestSubmit();
    return;
  }
  if (event.target.matches("input, textarea, select") || event.ctrlKey || event.metaKey || event.altKey) return;
  const button = /^[012]$/.test(event.key) && vote?.querySelector(`button[value="${event.key}"]`);
  const next = event.key === "n" && document.querySelector("[data-next-round]");
  if (button || next) {
    event.preventDefault();
    (button ? vote : again).requestSubmit(button || next);
  } else if (event.key === "e" && better) {
    event.preventDefault();
    better.open = true;
    better.querySelector("textarea").focus();
  }
});
document.querySelector(".fault, [role=alert]")?.scrollIntoView({ block: "nearest" });
