// Streams the answers of all columns. Without this module the same form is sent whole, and the page comes back answered.
import DOMPurify from "../vendor/dompurify/purify.es.mjs";
import { send } from "./shell.js";
import { _ } from "./words.js";

const form = document.getElementById("ask");
const panes = document.getElementById("panes");
const DRAFT = "luthier_draft"; // what was typed, while a column is changed
let running = null;

if (form) {
  const [prompt, stop, go, state] = [form.elements.prompt, form.querySelector("[data-stop]"), form.querySelector("[data-send]"), form.querySelector("[data-state]")];
  prompt.value ||= sessionStorage.getItem(DRAFT) ?? "";
  sessionStorage.removeItem(DRAFT);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (!running) ask();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && form.contains(document.activeElement)) {
      event.preventDefault();
      form.requestSubmit();
    } else if (event.key === "Escape" && running) running.abort();
  });
  stop.addEventListener("click", () => running?.abort());
  form.addEventListener("change", (event) => event.target.name === "models" && changeModels(event.target));
  document.addEventListener("click", clicked);
  for (const turn of panes.querySelectorAll("[data-turn]")) enliven(turn);
  grow(prompt);
  prompt.addEventListener("input", () => grow(prompt));

  /** Ask what is typed, or again what was asked in the exchange `again`, whose turns then give way. */
  async function ask(again = "") {
    if (!again && !prompt.value) return;
    running = new AbortController();
    const body = new FormData(form);
    const asked = again ? turnsOf(again)[0].querySelector("[data-asked]").textContent : prompt.value;
    body.set("prompt", asked);
    if (again) body.set("again", again);
    busy(true);
    say(_("Waiting for the models …"));
    let columns = [];
    try {
      const answer = await send("/playground/stream", { method: "POST", body, signal: running.signal, headers: { accept: "application/json" } });
      if (!answer.ok) throw new Error(await reason(answer));
      await each(answer.body, (told) => {
        if (told.type === "asked") {
          if (again) for (const turn of turnsOf(again)) cutFrom(turn);
          columns = [...panes.querySelectorAll("[data-pane]")].map((pane, place) => begin(pane, asked, told.exchange, told.panes[place].answer));
          goOn(told.exchange);
          if (!again) prompt.value = "";
          grow(prompt);
        } else if (told.type !== "end") columns[told.pane]?.take(told);
        if (told.type === "text") say(_("Answering …"));
      });
      say(_("Done."));
    } catch (error) {
      const stopped = error.name === "AbortError";
      say(stopped ? _("Stopped.") : error.message || _("The connection was lost."), !stopped);
      for (const column of columns) column.cut(stopped ? _("Stopped") : _("The connection was lost"));
    }
    running = null;
    busy(false);
    prompt.focus();
  }

  function clicked(event) {
    const turn = event.target.closest("[data-turn]");
    if (event.target.closest("[data-goes]")) {
      event.preventDefault();
      leave(event.target.closest("[data-goes]").href, Boolean(event.target.closest(".chip")));
    } else if (event.target.closest("[data-retry]")) {
      if (!running) ask(turn.dataset.exchange);
    } else if (event.target.closest("[data-copy-answer]")) copy(event.target.closest("button"), turn.querySelector("[data-source]").content.textContent);
    else if (event.target.closest("[data-link]") && navigator.clipboard) {
      event.preventDefault();
      copy(event.target, event.target.href);
    }
  }

  function busy(yes) {
    go.hidden = yes;
    stop.hidden = !yes;
    for (const body of panes.querySelectorAll("[data-body]")) body.setAttribute("aria-busy", String(yes));
    if (yes) stop.focus();
  }

  function say(text, wrong = false) {
    if (state.textContent !== text) state.textContent = text;
    state.classList.toggle("fault", wrong);
  }
}

/** To another address of the playground, with the settings and what was typed; a held-out question brings its own prompts. */
function leave(address, question = false) {
  const url = new URL(address, location.href);
  for (const [name, value] of new FormData(form)) if (name.startsWith("sampling.") && !(question && name === "sampling.system")) url.searchParams.set(name, value);
  if (!question) sessionStorage.setItem(DRAFT, form.elements.prompt.value);
  location.assign(url);
}

function turnsOf(exchange) {
  return [...panes.querySelectorAll(`[data-turn][data-exchange="${exchange}"]`)];
}

function cutFrom(turn) {
  while (turn.nextElementSibling) turn.nextElementSibling.remove();
  turn.remove();
}

async function copy(button, text) {
  await navigator.clipboard.writeText(text);
  const title = button.textContent;
  button.textContent = _("Copied");
  setTimeout(() => { button.textContent = title; }, 1500);
}

/** What only works with this script. */
function enliven(turn) {
  turn.querySelector("[data-copy-answer]").hidden = !navigator.clipboard;
  turn.querySelector("[data-retry]").hidden = false;
}

/** A turn at the end of a column, and what becomes of it as entries come. While it is written it is text; the Markdown of a whole
 *  answer comes from the server, cleaned there, and is cleaned once more here. */
function begin(pane, asked, exchange, answer) {
  const kind = pane.dataset.kind === "generic" ? "generic" : "dialogue";
  const turn = document.getElementById(`turn-${kind}`).content.cloneNode(true).querySelector("[data-turn]");
  const body = pane.querySelector("[data-body]");
  const part = (name) => turn.querySelector(`[data-${name}]`);
  const text = part("text");
  const title = pane.getAttribute("aria-label");
  body.querySelector("[data-hint]")?.remove();
  turn.dataset.exchange = exchange;
  part("asked").textContent = asked;
  if (kind === "generic") part("asked").previousElementSibling.textContent = _("%(model)s continues", { model: title });
  else part("name").textContent = title;
  Object.assign(part("edit"), { href: `/playground/${exchange}?edit=1`, hidden: false });
  part("prefer").value = answer;
  text.classList.add("writing");
  part("prompt").setAttribute("aria-label", _("Rendered prompt of %(model)s", { model: title }));
  body.append(turn);
  body.scrollTop = body.scrollHeight;
  let over = false;
  const end = (note) => {
    over = true;
    text.classList.remove("writing");
    part("note").textContent = note;
    part("source").content.textContent = part("source").content.textContent || text.textContent;
    enliven(turn);
  };
  return {
    take(told) {
      const near = body.scrollHeight - body.scrollTop - body.clientHeight < 40;
      if (told.type === "started") {
        part("prompt").textContent = told.rendered_prompt;
        part("rendered").hidden = false;
        part("proof").textContent = _("Answering");
      } else if (told.type === "reasoning" && kind !== "generic") {
        Object.assign(part("thought"), { hidden: false, open: true });
        part("reasoning").append(told.text);
      } else if (told.type === "text") {
        if (kind !== "generic" && told.text.trim()) part("thought").open = false;
        text.append(told.text);
      } else if (told.type === "finished") {
        part("source").content.textContent = text.textContent;
        if (kind !== "generic") text.replaceChildren(DOMPurify.sanitize(told.html, { RETURN_DOM_FRAGMENT: true }));
        end(told.note);
      } else if (told.type === "done") {
        part("proof").textContent = told.proof;
        part("prefer").hidden = panes.childElementCount < 2;
      } else if (told.type === "error") {
        end("");
        part("proof").textContent = _("No answer");
        Object.assign(part("error"), { textContent: `${told.message} ${told.hint}`.trim(), hidden: false });
      }
      if (near) body.scrollTop = body.scrollHeight;
    },
    cut(note) {
      if (over) return;
      part("proof").textContent = _("Half an answer");
      end(note);
    },
  };
}

/** From the first answer on the address is that of the conversation, which can be saved; every column goes on from itself. */
function goOn(exchange) {
  form.elements.parent.value = exchange;
  const keep = document.querySelector("[data-keep]");
  keep.hidden = false;
  keep.querySelector("[name=title]").value = "";
  for (const part of keep.querySelectorAll("[data-at]")) part.setAttribute(part.localName === "form" ? "action" : "href", `/playground/${exchange}${part.dataset.at}`);
  history.replaceState(null, "", `/playground/${exchange}`);
  for (const select of panes.querySelectorAll("select[name=models]")) select.nextElementSibling.value = select.value;
  for (const link of panes.querySelectorAll("a.close")) link.href = `/playground/${exchange}${new URL(link.href).search}`;
  for (const nav of panes.querySelectorAll("[data-blends]")) nav.remove();
  const anew = document.querySelector("[data-anew]");
  anew.href = `/playground?${new URLSearchParams([...panes.querySelectorAll("select[name=models]")].map((m) => ["models", m.value]))}`;
  anew.hidden = false;
}

/** The page with the chosen columns: a new one, or the same conversation going on with another model. */
function changeModels() {
  const chosen = [...form.querySelectorAll("select[name=models]")].filter((select) => select.value);
  const seen = new Set();
  const query = new URLSearchParams();
  for (const select of chosen) {
    if (seen.has(select.value)) continue;
    seen.add(select.value);
    query.append("models", select.value);
    query.append("follows", select.nextElementSibling.value || select.value);
  }
  const parent = form.elements.parent.value;
  leave(`/playground${parent ? `/${parent}` : ""}?${query}`);
}

function grow(area) {
  area.style.height = "auto";
  area.style.height = `${Math.min(area.scrollHeight + 2, 240)}px`;
}

async function reason(answer) {
  try {
    const { error } = await answer.json();
    return error.message;
  } catch {
    return _("The studio answered %(status)s.", { status: answer.status });
  }
}

/** Calls `take` with each line of a stream of JSON lines. */
async function each(stream, take) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) break;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) if (line) take(JSON.parse(line));
  }
}
