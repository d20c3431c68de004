// The upload page: drop a file, see how far it is, stop it, go on after a reload. Without this module the form is sent as it is.
import { bytes, seconds } from "./format.js";
import { Upload, forget, offsetOf, remembered, takeBack } from "./tus.js";
import { _ } from "./words.js";

const form = document.getElementById("upload");
const input = document.getElementById("file");
const drop = document.getElementById("drop");
const fault = document.getElementById("fault");
const sending = document.getElementById("sending");
const bar = document.getElementById("sent");
const text = document.getElementById("sent-text");
let upload = null;

for (const element of form.querySelectorAll(".with-js")) element.hidden = false;

for (const name of ["dragenter", "dragover"]) {
  drop.addEventListener(name, (event) => {
    event.preventDefault();
    drop.classList.add("over");
  });
}
for (const name of ["dragleave", "drop"]) drop.addEventListener(name, () => drop.classList.remove("over"));
drop.addEventListener("drop", (event) => {
  event.preventDefault();
  if (event.dataTransfer.files.length > 1) return complain(_("Drop one file at a time."));
  if (event.dataTransfer.files.length) {
    input.files = event.dataTransfer.files;
    form.requestSubmit();
  }
});
// A file that misses the box must not replace the page.
for (const name of ["dragover", "drop"]) window.addEventListener(name, (event) => event.preventDefault());

function complain(message, wayOut = "") {
  fault.replaceChildren();
  for (const text of [message, wayOut]) {
    if (!text) continue;
    const line = document.createElement("p");
    line.textContent = text;
    fault.append(line);
  }
  fault.hidden = false;
}

/** How far an upload is, and the time that is left where that is known. */
function far(sent, size, left) {
  const values = { sent: bytes(sent), size: bytes(size), left };
  return left ? _("%(sent)s of %(size)s, about %(left)s left", values) : _("%(sent)s of %(size)s", values);
}

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  if (upload || !input.files.length) return;
  const file = input.files[0];
  fault.hidden = true;
  if (file.size === 0) return complain(_("This file is empty."), _("Choose a file with at least one row."));
  sending.hidden = false;
  unfinished.replaceChildren();
  document.getElementById("send").disabled = true;
  const start = performance.now();
  let first = null;
  upload = new Upload(file, { name: form.elements.name.value, format: form.elements.format.value }, (sent, note) => {
    first ??= sent;
    bar.value = sent / file.size;
    const passed = (performance.now() - start) / 1000;
    const left = sent > first && passed > 1 ? seconds((passed / (sent - first)) * (file.size - sent)) : "";
    const state = sent === file.size ? _("uploaded; saving") : far(sent, file.size, left);
    text.textContent = note ? `${state}; ${note}` : state;
  });
  try {
    location.assign(`/datasets/${await upload.send()}`);
  } catch (error) {
    sending.hidden = true;
    if (!upload.stopped) complain(error.message, remembered().some(({ name }) => name === file.name) ? _("Choose the same file again to resume.") : "");
    else complain(_("Upload canceled; nothing was saved."));
  } finally {
    upload = null;
    document.getElementById("send").disabled = false;
  }
});

document.getElementById("stop").addEventListener("click", () => upload?.stop());

// After a reload: each bar shows how far its upload is, and it resumes once the same file is chosen.
const unfinished = document.getElementById("unfinished");
for (const before of remembered()) {
  const state = await offsetOf(before.url).catch(() => null);
  if (!state || state.dataset) {
    forget(before.key);
    if (state) location.assign(`/datasets/${state.dataset}`);
    continue;
  }
  const item = document.getElementById("unfinished-item").content.cloneNode(true).firstElementChild;
  const bar = item.querySelector("progress");
  bar.value = state.offset / before.size;
  bar.setAttribute("aria-label", _("Uploaded of %(name)s", { name: before.name }));
  const values = { name: before.name, sent: bytes(state.offset), size: bytes(before.size) };
  item.querySelector("span").textContent = _("%(name)s: %(sent)s of %(size)s uploaded. Choose the same file again to resume.", values);
  item.querySelector("button").setAttribute("aria-label", _("Discard %(name)s", { name: before.name }));
  item.querySelector("button").addEventListener("click", async () => {
    await takeBack(before);
    item.remove();
  });
  unfinished.append(item);
}
