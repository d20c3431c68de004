// Loads the page again until its answer is there; never under the hands of somebody who is filling in a form.
import { reload, whenLoaded } from "./reload.js";

let typing = false;
addEventListener("input", () => (typing = true));
whenLoaded(() => setTimeout(() => typing || reload(), 1200));
