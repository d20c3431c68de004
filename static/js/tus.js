// A resumable upload (tus 1.0): begun once, sent in pieces, and gone on with after a broken connection or a reload.
import { _ } from "./words.js";

const PIECE = 8 * 2 ** 20;
const HEADERS = { "Tus-Resumable": "1.0.0" };
const csrf = () => document.querySelector('meta[name="csrf-token"]').content;
const encode = (text) => btoa(String.fromCharCode(...new TextEncoder().encode(text)));

const PREFIX = "luthier-upload:";
const keyOf = (file) => `${PREFIX}${file.name}:${file.size}:${file.lastModified}`;

/** What was begun in this browser and is not complete, each file on its own: [{key, url, name, size}]. */
export function remembered() {
  const found = [];
  for (const key of Object.keys(localStorage).filter((key) => key.startsWith(PREFIX))) {
    try {
      found.push({ key, ...JSON.parse(localStorage.getItem(key)) });
    } catch {
      forget(key);
    }
  }
  return found;
}

export function forget(key) {
  localStorage.removeItem(key);
}

/** Take back an upload that is not complete. */
export async function takeBack({ key, url }) {
  await fetch(url, { method: "DELETE", headers: { ...HEADERS, "x-csrf-token": csrf() } }).catch(() => null);
  forget(key);
}

/** Bytes that are on the server, or null when the upload is not there any more. */
export async function offsetOf(url) {
  const answer = await fetch(url, { method: "HEAD", headers: HEADERS });
  if (!answer.ok) return null;
  return { offset: Number(answer.headers.get("Upload-Offset")), dataset: answer.headers.get("Luthier-Dataset") };
}

async function fault(answer) {
  let body = {};
  try {
    body = await answer.json();
  } catch {
    // an error page of a proxy in between
  }
  const error = new Error(body.error?.message ?? _("The server answered %(status)s.", { status: answer.status }));
  error.final = answer.status < 500 && answer.status !== 409 && answer.status !== 423;
  return error;
}

/** Sends a file and says how far it is. `send()` gives the dataset's id; `stop()` ends it for good. */
export class Upload {
  constructor(file, wishes, onProgress) {
    Object.assign(this, { file, wishes, onProgress, stopped: false, request: null, url: null });
  }

  async send() {
    const before = remembered().find(({ key }) => key === keyOf(this.file));
    let state = before ? await offsetOf(before.url).catch(() => null) : null;
    if (state) this.url = before.url;
    else {
      this.url = await this.begin();
      state = { offset: 0, dataset: null };
    }
    for (let tries = 0; !state.dataset; ) {
      try {
        state = await this.piece(state.offset);
        tries = 0;
      } catch (error) {
        if (this.stopped || error.final || ++tries > 12) throw error;
        this.onProgress(state.offset, _("the connection broke; trying again (%(tries)s)", { tries }));
        await new Promise((done) => setTimeout(done, Math.min(15000, 500 * 2 ** tries)));
        state = (await offsetOf(this.url).catch(() => null)) ?? state;
      }
    }
    forget(keyOf(this.file));
    return state.dataset;
  }

  async begin() {
    const metadata = Object.entries({ filename: this.file.name, ...this.wishes }).filter(([, value]) => value);
    const answer = await fetch("/v1/tus", {
      method: "POST",
      headers: {
        ...HEADERS,
        "x-csrf-token": csrf(),
        "Upload-Length": String(this.file.size),
        "Upload-Metadata": metadata.map(([key, value]) => `${key} ${encode(value)}`).join(","),
      },
    });
    if (!answer.ok) throw Object.assign(await fault(answer), { final: true });
    const url = answer.headers.get("Location");
    localStorage.setItem(keyOf(this.file), JSON.stringify({ url, name: this.file.name, size: this.file.size }));
    return url;
  }

  piece(offset) {
    return new Promise((done, failed) => {
      const request = (this.request = new XMLHttpRequest()); // fetch cannot say how much of a body was sent
      request.open("PATCH", this.url);
      for (const [name, value] of Object.entries({ ...HEADERS, "x-csrf-token": csrf(), "Upload-Offset": offset })) request.setRequestHeader(name, value);
      request.setRequestHeader("Content-Type", "application/offset+octet-stream");
      request.upload.addEventListener("progress", (event) => this.onProgress(offset + event.loaded, ""));
      request.addEventListener("load", async () => {
        if (request.status !== 204) return failed(await fault(new Response(request.responseText, { status: request.status })));
        const at = Number(request.getResponseHeader("Upload-Offset"));
        this.onProgress(at, "");
        done({ offset: at, dataset: request.getResponseHeader("Luthier-Dataset") });
      });
      request.addEventListener("error", () => failed(new Error(_("The connection broke."))));
      request.addEventListener("abort", () => failed(new Error(_("Stopped."))));
      request.send(this.file.slice(offset, offset + PIECE));
    });
  }

  async stop() {
    this.stopped = true;
    this.request?.abort();
    if (this.url) await takeBack({ key: keyOf(this.file), url: this.url });
  }
}
