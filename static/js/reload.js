// Loads the page again, unless somebody is on the way to another one: a reload would take their click back.
let leaving = false;
addEventListener("beforeunload", () => (leaving = true)); // also of a download, after which the page stays

export function reload() {
  if (!leaving) return location.reload();
  leaving = false;
  setTimeout(reload, 3000);
}

export function whenLoaded(then) {
  if (document.readyState === "complete") then();
  else addEventListener("load", then);
}
