// The prompt lab: scores that are fetched again while runs go on, the live preview of a prompt, and the try on a few rows.

import { send } from "./shell.js";
import { _ } from "./words.js";

const form = document.getElementById("prompt-form");

async function parse(answer) {
  return new DOMParser().parseFromString(await answer.text(), "text/html");
}

/** Fetch the scores again while a run goes on; an open fold that a person opened or a focused button is never pulled away. */
async function look() {
  const part = document.getElementById("scores");
  const trial = part?.parentElement.id === "trial";
  if (!part?.dataset.live) return;
  try {
    const fresh = (await parse(await fetch(part.dataset.live, { headers: { accept: "text/html" } }))).getElementById("scores");
    const busy = part.contains(document.activeElement) || (!trial && part.querySelector("details[open]"));
    if (fresh && part.isConnected && !busy) part.replaceWith(fresh);
  } catch {
    // The studio is away for a moment: look again.
  }
  setTimeout(look, trial ? 500 : 1500);
}

setTimeout(look, 1500);

let typing = 0;
let asked = 0;

function preview() {
  clearTimeout(typing);
  typing = setTimeout(async () => {
    const mine = ++asked;
    try {
      const answer = await send("/playground/prompts/preview", { method: "POST", body: new URLSearchParams(new FormData(form)) });
      if (mine === asked) document.getElementById("preview").replaceChildren(...(await parse(answer)).body.childNodes);
    } catch {
      // The next key tries again.
    }
  }, 300);
}

async function tryOut(event) {
  event.preventDefault();
  const sheet = document.getElementById("try-sheet");
  const place = document.getElementById("trial");
  sheet.hidden = false;
  place.textContent = _("Queued");
  sheet.scrollIntoView({ block: "nearest" });
  const page = await parse(await send("/playground/prompts/try", { method: "POST", body: new URLSearchParams(new FormData(form)) }));
  const found = page.getElementById("scores") ?? page.querySelector(".error");
  place.replaceChildren(found ?? _("The studio did not answer. Try again."));
  look();
}

if (form) {
  form.addEventListener("input", preview);
  if (!document.getElementById("preview").childElementCount) preview();
  form.querySelector("[data-try]")?.addEventListener("click", tryOut);
}
