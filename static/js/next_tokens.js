// Keys for the next-token page: a digit follows that line's link, Alt with it takes the last model's.
const lists = [...document.querySelectorAll("[data-next]")];
const typing = (at) => at.matches("input, textarea, select");

document.addEventListener("keydown", (event) => {
  const form = document.getElementById("look");
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && form?.contains(event.target)) return form.requestSubmit();
  if (typing(event.target) || event.ctrlKey || event.metaKey) return;
  if (event.key === "Backspace" && lists.length) {
    event.preventDefault();
    history.back();
  }
  const place = /^Digit([1-9])$/.exec(event.code)?.[1];
  const list = event.altKey ? lists.at(-1) : lists[0];
  const link = place && list?.children[place - 1]?.querySelector("a");
  if (link) {
    event.preventDefault();
    link.click();
  }
});
