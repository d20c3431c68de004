// Streams the answers of all columns. Without this module the same form is sent whole, and the page comes back answered.
import { send } from "./shell.js";

const form = document.getElementById("ask");
const panes = document.getElementById("panes");
const kinds = { generic: "Continues the text you type.", instruction: "Follows one instruction.", dialogue: "Holds a conversation." };
let running = null;

if (form) {
  const [prompt, stop, go, state] = [form.elements.prompt, form.querySelector("[data-stop]"), form.querySelector("[data-send]"), form.querySelector("[data-state]")];
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
  form.addEventListener("input", summarise);
  panes.addEventListener("change", changeModels);
  document.querySelector("[data-add]")?.addEventListener("change", changeModels);
  summarise();
  grow(prompt);
  prompt.addEventListener("input", () => grow(prompt));

  async function ask() {
    if (!prompt.value) return;
    running = new AbortController();
    const asked = prompt.value;
    busy(true);
    say("Waiting for the models …");
    let columns = [];
    try {
      const answer = await send("/playground/stream", { method: "POST", body: new FormData(form), signal: running.signal, headers: { accept: "application/json" } });
      if (!answer.ok) throw new Error(await reason(answer));
      await each(answer.body, (told) => {
        if (told.type === "asked") {
          columns = [...panes.querySelectorAll("[data-pane]")].map((pane) => begin(pane, asked));
          goOn(told.exchange);
          prompt.value = "";
          grow(prompt);
        } else if (told.type !== "end") columns[told.pane]?.take(told);
        if (told.type === "text") say("Answering …");
      });
      say("Done.");
    } catch (error) {
      const stopped = error.name === "AbortError";
      say(stopped ? "Stopped." : error.message || "The connection was lost.", !stopped);
      for (const column of columns) column.cut(stopped ? "Stopped." : "The connection was lost.");
    }
    running = null;
    busy(false);
    prompt.focus();
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

/** A turn at the end of a column, and what becomes of it as entries come. Text goes in as text, never as markup. */
function begin(pane, asked) {
  const kind = pane.dataset.kind === "generic" ? "generic" : "dialogue";
  const turn = document.getElementById(`turn-${kind}`).content.cloneNode(true).querySelector("[data-turn]");
  const body = pane.querySelector("[data-body]");
  const part = (name) => turn.querySelector(`[data-${name}]`);
  const text = part("text");
  body.querySelector("[data-hint]")?.remove();
  part("asked").textContent = asked;
  if (kind !== "generic") text.previousElementSibling.textContent = pane.getAttribute("aria-label");
  text.classList.add("writing");
  part("prompt").setAttribute("aria-label", `Rendered prompt of ${pane.getAttribute("aria-label")}`);
  body.append(turn);
  body.scrollTop = body.scrollHeight;
  let over = false;
  const end = (note) => {
    over = true;
    text.classList.remove("writing");
    if (note) Object.assign(part("note"), { textContent: note, hidden: false });
  };
  return {
    take(told) {
      const near = body.scrollHeight - body.scrollTop - body.clientHeight < 40;
      if (told.type === "started") {
        part("prompt").textContent = told.rendered_prompt;
        part("rendered").hidden = false;
        part("proof").textContent = "Answering";
      } else if (told.type === "text") text.append(told.text);
      else if (told.type === "finished") end(told.reason === "length" ? "Cut at the longest answer allowed." : "");
      else if (told.type === "done") part("proof").textContent = told.proof;
      else if (told.type === "error") {
        end("");
        part("proof").textContent = "No answer";
        Object.assign(part("error"), { textContent: `${told.message} ${told.way_out}`.trim(), hidden: false });
      }
      if (near) body.scrollTop = body.scrollHeight;
    },
    cut(note) {
      if (over) return;
      part("proof").textContent = "Half an answer";
      end(note);
    },
  };
}

/** From the first answer on the columns are settled, the address is that of the conversation, and it can be kept. */
function goOn(exchange) {
  form.elements.parent.value = exchange;
  const keep = document.querySelector("[data-keep]");
  keep.hidden = false;
  keep.querySelector("[name=title]").value = "";
  for (const part of keep.querySelectorAll("[data-at]")) part.setAttribute(part.localName === "form" ? "action" : "href", `/playground/${exchange}${part.dataset.at}`);
  history.replaceState(null, "", `/playground/${exchange}`);
  for (const select of panes.querySelectorAll("select[name=models]")) {
    const [hidden, name] = [document.createElement("input"), document.createElement("b")];
    Object.assign(hidden, { type: "hidden", name: "models", value: select.value });
    hidden.setAttribute("form", "ask");
    name.textContent = select.selectedOptions[0].textContent;
    select.replaceWith(hidden, name);
  }
  document.querySelector(".pick")?.remove();
  const anew = document.querySelector("[data-anew]");
  anew.href = `/playground?${new URLSearchParams([...panes.querySelectorAll("[name=models]")].map((m) => ["models", m.value]))}`;
  anew.hidden = false;
}

function changeModels(event) {
  const select = event.target;
  if (select.name !== "models") return;
  const names = [...document.querySelectorAll("select[name=models]")].map((s) => s.value).filter(Boolean);
  const unique = [...new Set(names)];
  const [pane, option] = [select.closest("[data-pane]"), select.selectedOptions[0]];
  const blended = pane?.querySelector("[data-blends]") || option.value.includes("@") || document.querySelector(`option[value="${CSS.escape(`${option.value}@0.5`)}"]`);
  if (select.hasAttribute("data-add") || unique.length < names.length || blended) {
    const query = new URLSearchParams(unique.map((name) => ["models", name]));
    location.assign(`/playground?${query}`);
    return;
  }
  pane.dataset.kind = option.dataset.kind;
  pane.setAttribute("aria-label", option.textContent);
  pane.querySelector("[data-kind-pill]").textContent = option.dataset.kind;
  const hint = pane.querySelector("[data-hint]");
  if (hint) hint.textContent = kinds[option.dataset.kind] ?? "";
}

/** The settings in one line, so that they are known while they are folded. */
function summarise() {
  const value = (name) => form.elements[`sampling.${name}`]?.value;
  const parts = [`temperature ${value("temperature")}`, `top-p ${value("top_p")}`, `${value("max_tokens") || "unlimited"} tokens`];
  form.querySelector("[data-summary]").textContent = [...parts, value("seed") ? `seed ${value("seed")}` : "a new seed each time"].join(" · ");
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
    return `The studio answered ${answer.status}.`;
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
