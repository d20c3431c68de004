// Loads the page again until its answer is there; never under the hands of somebody who is filling in a form.
let typing = false;
addEventListener("input", () => (typing = true));
setTimeout(() => typing || location.reload(), 1200);
