// Keys for the blind vote: 1, 2, and 0 for a tie.
const vote = document.getElementById("vote");
document.addEventListener("keydown", (event) => {
  if (!vote || event.target.matches("input, textarea, select") || event.ctrlKey || event.metaKey || event.altKey) return;
  const button = /^[012]$/.test(event.key) && vote.querySelector(`button[value="${event.key}"]`);
  if (button) {
    event.preventDefault();
    vote.requestSubmit(button);
  }
});
document.querySelector(".fault, [role=alert]")?.scrollIntoView({ block: "nearest" });
