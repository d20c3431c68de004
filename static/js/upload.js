// The upload page: drop a file, see how far it is, stop it. Without this module the form is sent as it is.
import { bytes, seconds } from "./format.js";

const form = document.getElementById("upload");
const input = document.getElementById("file");
const drop = document.getElementById("drop");
const fault = document.getElementById("fault");
const sending = document.getElementById("sending");
let request = null;

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
  if (event.dataTransfer.files.length > 1) return complain("Drop one file at a time.");
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

function done() {
  request = null;
  sending.hidden = true;
  document.getElementById("send").disabled = false;
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (request || !input.files.length) return;
  fault.hidden = true;
  if (input.files[0].size === 0) return complain("This file is empty.", "Choose a file with at least one row.");
  sending.hidden = false;
  document.getElementById("send").disabled = true;
  const start = performance.now();
  request = new XMLHttpRequest(); // fetch cannot say how much of a body was sent
  request.upload.addEventListener("progress", (progress) => {
    if (!progress.lengthComputable) return;
    const share = progress.loaded / progress.total;
    const passed = (performance.now() - start) / 1000;
    document.getElementById("sent").value = share;
    const left = share > 0 && passed > 1 ? `, about ${seconds((passed / share) * (1 - share))} left` : "";
    document.getElementById("sent-text").textContent = `${bytes(progress.loaded)} of ${bytes(progress.total)}${left}`;
  });
  request.addEventListener("load", () => {
    let answer = {};
    try {
      answer = JSON.parse(request.responseText);
    } catch {
      // an error page of a proxy in between
    }
    const status = request.status;
    done();
    if (status === 201) location.assign(answer.location);
    else complain(answer.error?.message ?? `The server answered ${status}.`, answer.error ? "" : "Try again.");
  });
  request.addEventListener("error", () => {
    done();
    complain("The connection broke before the file was there; nothing was saved.", "Send it again.");
  });
  request.addEventListener("abort", () => {
    done();
    complain("Stopped; nothing was saved.");
  });
  const body = new FormData();
  for (const name of ["name", "format"]) body.append(name, form.elements[name].value);
  body.append("file", input.files[0]);
  request.open("POST", form.action);
  request.setRequestHeader("accept", "application/json");
  request.setRequestHeader("x-csrf-token", document.querySelector('meta[name="csrf-token"]').content);
  request.send(body);
});

document.getElementById("stop").addEventListener("click", () => request?.abort());
